"""The HTTP service: the only importer of litestar."""
