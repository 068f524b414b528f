"""`inlay new`: a package with one working method, written from templates."""
