"""A run's page: read its folder as plain JSON and write one HTML file that needs no network or framework."""

from .html_page import page, write_page
from .read_run import read_run

__all__ = ["page", "read_run", "write_page"]
