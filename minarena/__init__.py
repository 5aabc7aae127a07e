"""minarena: learn which of two chatbot answers a person prefers.

The README's reading order says where to begin.
"""
