"""What files and folders of other formats are, and what to do with them, as the ends of sentences.

Each begins with a verb, such as "is an ONNX model. …", for a message that begins with the name of the file.
"""
