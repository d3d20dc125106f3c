"""``python -m abdlab`` is ``abdlab``, where the command is not on the path."""

from abdlab.cli import main

if __name__ == "__main__":
    main()
