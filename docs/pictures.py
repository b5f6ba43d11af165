"""Pictures of the documentation: parts of a real report, and the plot of a real run. Needs chromium and Pillow.

python docs/pictures.py                  the report of docs/results/quick
python docs/pictures.py RUN              and strengths.png, of the folder of `steertune train mean_difference`
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).parent.parent
PICTURES = Path(__file__).parent / "pages" / "pictures"
REPORT = ROOT / "docs" / "results" / "quick" / "report.html"
CHARTS = {  # picture -> chart of a study
    "first-study-effects": ROOT / "docs" / "results" / "first_study" / "charts" / "effects.png",
    "curves": ROOT / "docs" / "results" / "curves" / "charts" / "curves.png",
}
PARTS = {  # picture -> beginnings of the headings of the sections that it shows
    "report-top": ("The result",),
}
WIDTH, COLOURS = 960, 64


def only(page: str, headings: tuple[str, ...]) -> str:
    """A report's HTML with some of its sections."""
    start = page.index("<h2")
    sections = re.split(r"(?=<h2)", page[start : page.index("</body>")])
    kept = [s for s in sections if re.sub(r"<[^>]+>", "", s).strip().startswith(headings)]
    if len(kept) < len(headings):
        raise SystemExit(f"{REPORT}: no sections {headings}")
    title = page[:start] if headings == PARTS["report-top"] else re.sub(r"<h1.*?</h1>", "", page[:start], flags=re.S)
    return f"{title}{''.join(kept)}</body></html>"


def picture(html: str, file: Path) -> None:
    """Photograph a page, cut away what is white, keep few colours."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder) / "page.html", Path(folder) / "shot.png"
        page.write_text(html, encoding="utf-8")
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={WIDTH},3000",
        ]
        subprocess.run([chromium, *options, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True)
        save(Image.open(shot).convert("RGB"), file)


def save(image: Image.Image, file: Path) -> None:
    """As a small PNG, with a margin."""
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    if box is None:
        raise SystemExit(f"{file}: nothing but white")
    left, top, right, bottom = box
    end = (min(image.width, right + 16), min(image.height, bottom + 16))
    cut = image.crop((max(0, left - 16), max(0, top - 16), *end))
    file.parent.mkdir(parents=True, exist_ok=True)
    cut.quantize(COLOURS).save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}: {cut.width} x {cut.height}, {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Make them all."""
    for name, headings in PARTS.items():
        picture(only(REPORT.read_text(encoding="utf-8"), headings), PICTURES / f"{name}.png")
    for name, chart in CHARTS.items():
        save(Image.open(chart).convert("RGB"), PICTURES / f"{name}.png")
    for run in sys.argv[1:]:
        save(Image.open(Path(run) / "charts" / "side_effects.png").convert("RGB"), PICTURES / "strengths.png")


if __name__ == "__main__":
    main()
