"""The commands `generate` and `chat`: one prompt or a conversation in the terminal, and pictures of a decode.

Read `chat.py` first, then `generate.py`. `dialogue.py` keeps the conversation, `cells.py` says what each pass did to
each position, `live.py` draws that on a terminal and `picture.py` into a file, `console.py` checks input and output.
"""
