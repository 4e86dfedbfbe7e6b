"""A bundle of drawn parts, for whoever has none."""

from pathlib import Path

from stpm.tools.parts import write_dataset


def drawn(folder: Path) -> Path:
    """Made the first time, by stpm-build; that needs torch and takes a minute."""
    bundle = folder / "int8"
    if not (bundle / "manifest.json").is_file():
        from stpm.build.cli import build_main

        write_dataset(folder / "parts", "bushing", good=16, test=4)
        words = (
            f"--engine int8 --category bushing --data {folder / 'parts'} --teacher builtin --epochs 2 --batch 8 "
            f"--qad-epochs 1 --max-drop 1,1,1 --work {folder / 'work'} --out {bundle}"
        )
        code = build_main(words.split())
        if code:
            raise SystemExit(code)
    return bundle
