"""A small text-classification task from any machine: to which standard-library package does a docstring belong?"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")


def docstrings_of(package: str) -> Iterator[str]:
    """Docstrings of its functions and classes, of at least four words, each text once."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    seen: set[str] = set()
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="ignore"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text.split()) >= 4 and text not in seen:
                seen.add(text)
                yield text


def load(per_package: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(training, test): texts and the index of their package, as many of each package, a quarter of them for the test.

    Raises `FileNotFoundError` where Python was installed without its sources.
    """
    by_package = [list(docstrings_of(package)) for package in PACKAGES]
    size = min(per_package, *(len(texts) for texts in by_package))
    if size == 0:
        folder = sysconfig.get_paths()["stdlib"]
        raise FileNotFoundError(
            f"{folder} lacks docstrings of {', '.join(PACKAGES)}; use a Python with sources"
        )
    draw = random.Random(0)
    train, test = [], []
    for label, texts in enumerate(by_package):
        chosen = draw.sample(texts, size)
        held_out = size // 4
        test += [(text, label) for text in chosen[:held_out]]
        train += [(text, label) for text in chosen[held_out:]]
    draw.shuffle(train)
    return train, test


class Encoded(Dataset[dict[str, Tensor]]):
    """Tokenized texts of one length, as the Trainer takes them."""

    def __init__(self, rows: list[tuple[str, int]], tokenizer: Any, length: int) -> None:
        texts = [text for text, _ in rows]
        self._fields = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        self._labels = torch.tensor([label for _, label in rows])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: values[index] for name, values in self._fields.items()}
        return {**row, "labels": self._labels[index]}
