"""The 3D question-answering room: labels become questions, answers and typed batches (spec section 5).

`coordinate_tokens` turns numbers into words and back; `task` says what a family of questions is, `object_tasks`
and `back_projection` are those of the paper; `mixture` draws examples; `augment` varies images and their labels;
`question_data` puts all of it together.
"""
