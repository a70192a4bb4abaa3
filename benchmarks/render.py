"""Renders `benchmarks/README.md`, and its picture, from its template and the recorded results: python -m benchmarks.render"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def page() -> str:
    """The page, its tables made from `results/`."""
    from benchmarks import (
        batching,
        batching_speed,
        comparison_tables,
        cutting,
        decoding,
        fast_path,
        indexing,
        packing,
        processes,
        throughput_tables,
    )

    text = (HERE / "README.template.md").read_text()
    tables = (
        ("@COMPARISONS@", comparison_tables.render),
        ("@THROUGHPUT@", throughput_tables.render),
        ("@FAST_PATH@", fast_path.render),
        ("@CUTTING@", cutting.render),
        ("@BATCHING@", batching.render),
        ("@BATCHING_SPEED@", batching_speed.render),
        ("@DECODING@", decoding.render),
        ("@INDEXING@", indexing.render),
        ("@PACKING@", packing.render),
        ("@PROCESSES@", processes.render),
    )
    for placeholder, render in tables:
        text = text.replace(placeholder, render())
    return text


def write_page() -> None:
    """Write it, and draw."""
    from benchmarks import comparison_tables, throughput_tables

    comparison_tables.draw()
    throughput_tables.draw(HERE / "results" / "throughput.svg")
    (HERE / "README.md").write_text(page())


if __name__ == "__main__":
    write_page()
