"""The 3D question-answering room: labels become questions, answers and typed batches (spec section 5)."""
