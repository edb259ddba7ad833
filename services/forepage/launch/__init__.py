"""`forepage up`: every process of one host as supervised children, started, watched and ended together."""
