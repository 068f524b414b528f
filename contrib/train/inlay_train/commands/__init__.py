"""The commands of `inlay`, a module each; importing them imports neither torch nor inlay."""
