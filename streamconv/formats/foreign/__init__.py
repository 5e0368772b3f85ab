"""Describes files and folders of other formats, and says what to do with them.

Each description is the rest of a sentence, such as "is an ONNX model. …", for a message that begins with the file.
"""
