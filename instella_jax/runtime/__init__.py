"""Devices, processes, and files of this machine."""
