"""Which release of DeepSpeed's API this is."""

from __future__ import annotations

API = "0.19.8"
"""The DeepSpeed whose names, signatures and defaults are followed."""
VERSION = f"{API}+unishard"
