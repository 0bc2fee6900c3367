"""Repositories of the Hugging Face hub: their names, what they hold, downloads, and what goes wrong there in words.

Knows files and digests; what a file is good for is known by who asks for it.
"""
