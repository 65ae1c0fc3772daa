"""Protocols computed from features made once, and what is made of their numbers: tables and exports."""
