"""`mmalign compare`: several evaluations against each other, refused where their numbers may not be compared."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.cli.options import Command, Option, UsageError, number, one_of, whole

VERB = Command(
    prog="mmalign compare",
    description=(
        "Reads the report.json of several evaluations of the same prompts, seeds, sampler, scorers and base, and tells which run "
        "wins more often, with intervals for the differences. Writes compare.html and compare.json."
    ),
    example="mmalign compare runs/smpo/evaluation runs/dpo/evaluation --names SmPO DPO",
    options=[
        Option(
            name="runs",
            help="folders of evaluations, or their report.json; may stand first without --runs",
            metavar="RUN",
            many=True,
            required=True,
        ),
        Option(name="names", help="what to call them; none is their paths", metavar="NAME", many=True, nullable=True),
        Option(
            name="allow_different",
            help="what they may differ in: base, each win rate then being over its own",
            convert=one_of("base"),
            metavar="base",
            many=True,
            nullable=True,
        ),
        Option(name="num_resamples", help="bootstrap resamples over prompts", convert=whole, metavar="N", default=2000),
        Option(name="confidence", help="of the intervals", convert=number, metavar="X", default=0.95),
        Option(name="output_dir", help="where the two files go", metavar="DIR", default="comparison"),
    ],
    epilog="Exit code: 0 compared; 2 they cannot be compared, and the one line says in what they differ.\n",
)


def run(argv: Sequence[str]) -> int:
    """Compares, prints the table and writes the page."""
    words = list(argv)
    given = VERB.read(["--runs", *words] if words and not words[0].startswith("-") else words)
    if given is None:
        return 0
    names = given["names"] or given["runs"]
    if len(names) != len(given["runs"]):
        raise UsageError(f"--names gives {len(names)} names for {len(given['runs'])} runs")
    if len(set(names)) < len(names):
        raise UsageError(f"runs need different names, got {', '.join(names)}; give --names")

    from mmalign.evaluation import compare_results, comparison_lines, read_report, write_comparison

    comparison = compare_results(
        {name: read_report(run) for name, run in zip(names, given["runs"], strict=True)},
        allow_different=given["allow_different"] or (),
        num_resamples=given["num_resamples"],
        confidence=given["confidence"],
    )
    page = write_comparison(comparison, given["output_dir"])
    print("\n".join(comparison_lines(comparison)))
    print(f"comparison: {page}")
    return 0
