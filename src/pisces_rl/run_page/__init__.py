"""The page of a run: its folder as plain JSON, and that as one HTML file without network or framework."""

from .html_page import page, write_page
from .read_run import read_run

__all__ = ["page", "read_run", "write_page"]
