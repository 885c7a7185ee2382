"""Files, folders and repositories: written whole or not at all, checked before they are used."""
