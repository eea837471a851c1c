"""One self-contained HTML page of one or several runs: the numbers, and every trajectory turn by turn.

    python -m common.report runs/laptop
    python -m common.report runs/dagger runs/sft --out comparison.html

The page opens from disk and loads nothing: its style, its script (report.* and report_viewer.js beside this file) and
its data are in it, and a content security policy forbids it all else. What models and programs wrote is data: JSON
inside script elements that are no scripts, gzipped and in base64 but for the index (which trajectories there are, ids
in plain text). The page unpacks a chunk of some dozens of trajectories when one of them is opened.

Every number comes from common/metrics.py. What a run has not got yet is shown as missing. The page is written to a
temporary name first, so a reader never sees half of one. In memory is one chunk, the index and the issues' texts.
"""

import base64
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import metrics, report_numbers, run
from common.errors import InputError
from common.report_trajectories import Collection


@dataclass(kw_only=True)
class Args:
    out: str | None = None
    """the page to write (default: report.html in the run's directory; several runs need it)"""


# ---------------------------------------------------------------- the page


def as_json(value: object) -> str:
    """JSON that can stand in a script element of an HTML page: nothing in it ends the element or a line of a script."""
    text = json.dumps(run.finite(value), ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def template() -> dict[str, str]:
    """The page's parts: html, css, js."""
    here = Path(__file__)
    parts = {kind: here.with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    parts["js"] += "\n" + here.with_name("report_viewer.js").read_text(encoding="utf-8")
    return parts


def policy(style: str, script: str) -> str:
    """Nothing may be loaded or run but this very style and this very script."""

    def allowed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {allowed(script)}; style-src {allowed(style)}; "
        "base-uri 'none'; form-action 'none'"
    )


def write_page(out: Path, data: dict, spool) -> int:
    """Write the page with the chunks in `spool`; returns its size in bytes. `data["bytes"]` is filled in here."""
    parts = template()
    parts["data"] = as_json(data | {"bytes": None})
    fill = {
        "policy": policy(parts["css"], parts["js"]),
        "title": data["title"].replace("&", "&amp;").replace("<", "&lt;"),
        "style": parts["css"],
        "script": parts["js"],
        "data": parts["data"],
    }
    # one pass, so that nothing which is filled in is looked at again
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fill.get(match[1], match[0]), parts["html"])
    head, tail = page.rsplit("{{chunks}}", 1)
    chunks = spool.seek(0, os.SEEK_END)
    width = 12
    size = len(head.encode()) + chunks + len(tail.encode()) + width - len("null")
    before, after = head.split('"bytes":null', 1)
    half = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with open(half, "wb") as stream:
            stream.write(f'{before}"bytes":{size:{width}d}{after}'.encode())
            spool.seek(0)
            while block := spool.read(1 << 20):
                stream.write(block)
            stream.write(tail.encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(half, out)
    finally:
        half.unlink(missing_ok=True)
    return size


# ---------------------------------------------------------------- the command


def report(homes: list[Path], out: Path) -> dict:
    """Write the page of these runs to `out`, and where that is a run's own place the summaries of its iterations with it.
    Returns the summary of the page."""
    own = out.parent.resolve() == homes[0].resolve() and len(homes) == 1
    runs = [metrics.write_summaries(home) if own else metrics.read(home) for home in homes]
    metrics.check_comparable(runs)
    data = report_numbers.describe_runs(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent) as spool:
        collection = Collection(spool)
        for number, home in enumerate(homes):
            collection.add_run(number, home)
        data |= collection.finish()
        data |= {
            "raw": collection.raw,
            "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "command": "python -m common.report",
        }
        size = write_page(out, data, spool)
    print(f"{out}: {size / 1e6:.1f} MB, from {collection.raw / 1e6:.1f} MB of trajectories and labels")
    return {"runs": len(runs), "trajectories": len(collection.rows), "bytes": size}


def _main() -> None:
    homes = metrics.homes_from(sys.argv)

    def work(args: Args) -> None:
        metrics.check_homes(homes, "python -m common.report")
        if len(homes) > 1 and args.out is None:
            raise InputError("several runs: --out FILE says where their page goes")
        out = homes[0] / "report.html" if args.out is None else Path(args.out)
        if out.suffix != ".html" or out.is_dir():
            raise InputError(f"--out {args.out}: the page goes into a file, and its name ends in .html")
        run.print_summary(report(homes, out))

    run.main(Args, work, "python -m common.report RUN [RUN...] [--out FILE]")


if __name__ == "__main__":
    _main()
