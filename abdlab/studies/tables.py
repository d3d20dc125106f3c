"""Results of several runs as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from abdlab.labels import in_order, name_of

#: stands in a table where there is no number
NONE = "-"


def rows(results: Mapping[str, Mapping]) -> list[dict]:
    """Metrics by label, as :func:`abdlab.students.distill_all` returns them, as rows with
    what a reader must know as ``notes``.
    """
    out = []
    for label, m in results.items():
        notes = [
            f"{name}: no vaccine was found, so this student is undefended by it"
            for name, r in m.get("defenses", {}).items()
            if r.get("found") is False
        ]
        numbers = {"seed": m["seed"], "acc": m["acc"], "asr": m.get("asr")}
        numbers |= {"robust": m["robust"]} if m.get("robust") is not None else {}
        out.append({"label": label, **numbers, "threads": m.get("threads"), "notes": notes})
    return out


def results_table(results: pd.DataFrame) -> pd.DataFrame:
    """ACC, ASR and, where it was measured, robust accuracy in percent by method, "mean ±
    std" where there are several seeds, and "unknown" where nobody could measure; n is the
    number of seeds.
    """

    def cell(values: pd.Series) -> str:
        values = values.dropna()
        if values.empty:
            return "unknown"
        return f"{100 * values.mean():.1f}" + (
            f" ± {100 * values.std():.1f}" if len(values) > 1 else ""
        )

    parts = {label: results[results["label"] == label] for label in dict.fromkeys(results["label"])}
    order = in_order(parts)
    return pd.DataFrame(
        [
            {
                "method": name_of(k),
                "ACC (%)": cell(pd.to_numeric(parts[k]["acc"])),
                "ASR (%)": cell(pd.to_numeric(parts[k]["asr"])),
                **({"robust (%)": cell(parts[k]["robust"])} if "robust" in results else {}),
                "n": len(parts[k]),
            }
            for k in order
        ]
    ).set_index("method")


def varied(results: pd.DataFrame, axes: Iterable[str]) -> list[str]:
    """The axes of a study that a cell's trigger, source, defense and seed do not tell,
    and that take several values in these results.
    """
    told = {"seed", "seeds", "attack.trigger", "trigger", "methods", "source", "defenses", "label"}
    return [a for a in axes if a not in told and a in results and results[a].nunique() > 1]


def study_summary(results: pd.DataFrame, axes: Sequence[str] = ()) -> pd.DataFrame:
    """Mean, standard deviation (percent) and n of ACC and ASR per trigger, label and
    value of the axes; each model counts once in a cell.

    Clean teachers, on which triggers are optimised, are left out, since triggers share
    them.

    Args:
        results: what :func:`abdlab.studies.results.results` returns.
        axes: see :func:`varied`; what is not named is averaged over.
    """
    once = _models(results, *axes)
    once = once.assign(asr=once["asr"].astype(float))
    out = once.groupby(["trigger", "source", "defense", *axes], dropna=False, sort=False)[
        ["acc", "asr"]
    ].agg(["mean", "std", "count"])
    columns = {}
    for name in ("acc", "asr"):
        columns[f"{name.upper()} mean (%)"] = (100 * out[name, "mean"]).round(1)
        columns[f"{name.upper()} std (%)"] = (100 * out[name, "std"]).round(1)
    return pd.DataFrame({**columns, "n": out["acc", "count"]}).sort_index(
        level=[0, 1], sort_remaining=False
    )


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text for a reader: one decimal, and a dash where there is no number,
    such as the deviation of one run, or an axis that a job does not have.
    """
    if table.index.nlevels > 1:
        index = table.index.to_frame().astype(object)
        table = table.set_axis(pd.MultiIndex.from_frame(index.where(index.notna(), NONE)))
    return table.map(lambda v: NONE if v != v or v is None else _text(v))


def _text(value: object) -> str:
    return f"{round(value, 1) + 0.0:.1f}" if isinstance(value, float) else str(value)


def _models(results: pd.DataFrame, *axes: str) -> pd.DataFrame:
    """Each model once (per value of ``axes``), without the clean teachers on which
    triggers are optimised: those belong to no trigger.
    """
    return results[results["source"] != "clean_teacher"].drop_duplicates(["label", "model", *axes])


def study_matrix(results: pd.DataFrame) -> pd.DataFrame:
    """ACC/ASR in percent as text, means over models: a row per trigger and defense, a
    column per source, in the study's order.

    A cell that was not run is empty, and "-" stands for the ASR of a model without
    attack. The teacher is a source without a defense; its clean twin, on which triggers
    are optimised, is left out, since triggers share it.

    Args:
        results: what :func:`abdlab.studies.results.results` returns; each model counts once.
    """
    rows = ["trigger", "defense"]
    once = _models(results)
    means = 100 * once.groupby([*rows, "source"], dropna=False, sort=False)[
        ["acc", "asr"]
    ].mean().astype(float)
    text = pd.Series(
        [f"{acc:.1f}/{asr:.1f}".replace("nan", "-") for acc, asr in means.to_numpy()], means.index
    )
    order = once.set_index(rows).index.unique()
    sources = sorted(
        once["source"].unique(), key=lambda name: name != "teacher"
    )  # the teacher first, then as they come
    return text.unstack("source", fill_value="").reindex(order)[sources]


def pareto_front(results: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other row beats: none has at least their ACC and at most their
    ASR, and is better in one; by ACC.
    """
    ordered = results.sort_values(["acc", "asr"], ascending=[False, True])
    best, keep = float("inf"), []
    for index, asr in ordered["asr"].items():
        if asr < best:
            best = asr
            keep.append(index)
    return results.loc[keep].sort_values("acc")
