"""The robot data room: RLDS episodes on disk -> an index -> a shuffled, resumable stream of typed batches.

A reader may follow the data: `tfrecord`, `example_wire` and `rlds_folder` read what is on disk; `registry` and
`canonical` bring each data set's conventions to ours; `shard_reader`, `index_build` and `episode_index` make and
read the index; `chunks` and `images` turn frames into samples; `mixture`, `dataset` and `loader` serve them.
"""
