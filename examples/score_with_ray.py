"""Score any number of images with Ray: a folder, or Parquet files with a column of images; goes on after a kill.

    python examples/score_with_ray.py DETECTOR INPUT OUTPUT [--workers 2] [--gpus-per-worker 0] [--column image]

DETECTOR is a folder that `setar fit` or `detector.save_pretrained` wrote, INPUT a folder of images or of Parquet files;
on a cluster every machine has to see them and OUTPUT. The work is cut into parts, and each becomes one Parquet file in
OUTPUT, whole or not at all. The same command again scores the parts that are missing.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pyarrow as pa
import pyarrow.parquet as pq
import ray

COLUMNS = ["label", "probability", "score", "is_id", "threshold", "error"]
KINDS = [pa.string(), pa.float32(), pa.float32(), pa.bool_(), pa.float32(), pa.string()]
SCHEMA = pa.schema([("id", pa.string()), *zip(COLUMNS, KINDS, strict=True)])


def parts_of(folder: Path, images: int) -> list[dict]:
    """The work: so many paths each, or a row group of a Parquet file."""
    files = sorted(folder.rglob("*.parquet"))
    if files:
        return [{"file": str(file), "group": i} for file in files for i in range(pq.ParquetFile(file).num_row_groups)]
    from setar_peft.data.folders import read_folder

    paths = [str(path) for path in read_folder(folder, labelled=False).paths]
    return [{"paths": paths[start : start + images]} for start in range(0, len(paths), images)]


class Scorer:
    """Lives in a process of its own with the detector, and scores one part after another."""

    def __init__(self, detector: str, column: str, output: str) -> None:
        import torch

        from setar_peft import OODDetector

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.column, self.output = column, Path(output)
        self.verdicts = OODDetector.from_pretrained(detector, device=device).on(column)

    def __call__(self, batch: dict) -> dict:
        """Write the file of a part, and say how many images it has."""
        name, part = str(batch["name"][0]), json.loads(batch["part"][0])
        if "paths" in part:
            images = ids = part["paths"]
        else:
            table = pq.ParquetFile(part["file"]).read_row_group(part["group"], columns=[self.column])
            images = table[self.column].to_pylist()
            ids = [f"{part['file']}#{part['group']}.{row}" for row in range(len(images))]
        columns = {"id": ids, **self.verdicts({self.column: images})}
        unfinished = self.output / f".{name}.{os.getpid()}"
        pq.write_table(pa.table(columns, SCHEMA), unfinished)
        unfinished.rename(self.output / name)
        return {"images": [len(ids)]}


def main() -> None:
    """Score what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("detector", "input", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    parser.add_argument("--column", default="image", help="of images in Parquet files: paths, bytes, or as in datasets")
    parser.add_argument("--part", type=int, default=1000, help="images of a folder that are one part of the work")
    given = parser.parse_args()
    parts = [json.dumps(part) for part in parts_of(given.input.resolve(), given.part)]
    job = hashlib.sha256("\n".join([(given.detector / "detector.json").read_text(), *parts]).encode()).hexdigest()
    given.output.mkdir(parents=True, exist_ok=True)
    begun = given.output / "_job"
    if begun.exists() and begun.read_text() != job:
        parser.error(f"{given.output} was begun with another detector or other inputs; give another folder.")
    begun.write_text(job)
    todo = [{"name": f"{number:06}.parquet", "part": part} for number, part in enumerate(parts)]
    todo = [part for part in todo if not (given.output / part["name"]).exists()]
    print(f"{len(todo)} of {len(parts)} parts to do", flush=True)
    if todo:
        if "RAY_ADDRESS" not in os.environ:  # this machine alone, where workers without a core would wait for ever
            ray.init(num_cpus=max(given.workers, os.cpu_count() or 1))
        done = ray.data.from_items(todo, override_num_blocks=min(len(todo), 1000)).map_batches(
            Scorer,
            batch_size=1,
            fn_constructor_args=(str(given.detector.resolve()), given.column, str(given.output.resolve())),
            compute=ray.data.ActorPoolStrategy(size=min(given.workers, len(todo))),
            num_gpus=given.gpus_per_worker or None,
        )
        print(sum(row["images"] for row in done.iter_rows()), "images scored")


if __name__ == "__main__":
    main()
