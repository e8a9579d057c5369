"""regrad: knowledge as retrievable gradients. The command line lives in `regrad_cli.cli`; nothing happens at import."""

__version__ = "0.1.0"
