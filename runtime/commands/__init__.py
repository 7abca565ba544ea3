"""The commands of the device side: run, chat, serve, bench, info, and how they write to a terminal or a page."""
