"""What a person sees of a run: the live console view and the HTML and PNG reports.

``nemo_apo.report.console`` shows a run while it trains; ``write_report`` turns finished (or
unfinished) run folders into ``report.html`` and ``report.png``. Importing this package loads
neither matplotlib nor plotly.
"""

from collections.abc import Sequence
from pathlib import Path

from nemo_apo.record import REPORT_HTML, REPORT_PNG


def write_report(runs: Sequence[Path], out_dir: Path) -> tuple[Path, Path]:
    """Write the report of one run folder, or of several overlaid, and return (html, png).

    Args:
        runs: run folders; see ``nemo_apo.record`` for what they hold.
        out_dir: folder of the two files; made if missing.

    Raises:
        ValueError: if no run is given, or a run folder is missing or malformed.
    """
    from nemo_apo.report.history import read_runs
    from nemo_apo.report.html import render_html
    from nemo_apo.report.png import render_png

    histories = read_runs(runs)
    html = render_html(histories)
    png = render_png(histories)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    html_path, png_path = out_dir / REPORT_HTML, out_dir / REPORT_PNG
    html_path.write_text(html, encoding="utf-8")
    png_path.write_bytes(png)
    return html_path, png_path
