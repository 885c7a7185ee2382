"""LARA inside other people's training programs; in the wheel as `lara_adapter.integrations`.

Every module here imports its host itself and declares no dependency on it: lara_adapter is installed into the host's
environment and must not move its pins. Of the library only `lara_adapter.cli` imports from here.
"""
