"""A trained model as a folder for others: written, checked against its source, described, and sent to the hub.

writing     what `export` does, in order
authors     the layout in which ChatGLM's authors publish, int4 and int8 among it
parity      the folder loaded anew against what it was made from
facts, card what is known of how the model was made, and the README.md that says it
hub         sending the folder to the hub
"""
