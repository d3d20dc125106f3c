"""The attacker's wing: triggers, how they are optimised, and how data are poisoned with them."""
