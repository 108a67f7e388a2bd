"""The 36 faults that a server must bear: what is done, and what is expected then.

A test says which of them it proves with `@pytest.mark.fault(NUMBER, ...)`; what takes long is a drill of
tools/drills.py.
"""

FAULTS = {
    1: ("damaged safetensors: empty, cut, overlapping, lying", "refused in one sentence that names file and reason"),
    2: ("tensors missing, unexpected or of other shapes", "the first are named before memory is taken"),
    3: ("a header of 100,000 tensors, or too long", "refused by its size"),
    4: ("a pickle as a checkpoint", "its code never runs"),
    5: ("an index that names files outside the model's folder", "refused"),
    6: ("a model that is no safetensors, such as GGUF", "refused in one sentence"),
    7: ("a picture of 90 million pixels", "400 before it is decoded"),
    8: ("animated, cut, turned, CMYK, SVG and other pictures", "taken as what they show, or 400"),
    9: ("an upload above the limit, or whose length lies", "413 as it arrives, nothing left"),
    10: ("videos too long, without frames, cut, sound alone", "decoded in a child with limits; 400"),
    11: ("a playlist that calls itself mp4", "400, and nothing is fetched"),
    12: ("addresses of this machine and its network", "not fetched; fetching is off by default"),
    13: ("file names with ../, NUL, 5,000 characters", "never used"),
    14: ("model names that are paths", "404"),
    15: ("fields that name the server's paths", "400"),
    16: ("NaN, 1e308, -1, 2^63, odd sizes and counts", "400 with what is legal"),
    17: ("prompts that are empty, 1 MB, NUL, lone surrogates", "400, or taken; a cut is told"),
    18: ("bad JSON, keys twice, depth, unknown fields, cut forms", "400 with an OpenAI error body, never 5xx"),
    19: ("10,000 creates at once", "as many as fit are taken, 429 for the rest; health answers within 1.5 s"),
    20: ("500 bodies that stop half way", "ended by a deadline; others are served meanwhile"),
    21: ("one Idempotency-Key twice, and with another body", "the same job; 422"),
    22: ("a client that goes away while it creates", "no job, or one that can be found; no half upload"),
    23: ("200 downloads that are broken off", "no descriptor and no memory is lost"),
    24: ("ranges: one, the end, many, beyond, stale; HEAD", "206, 416, 200"),
    25: ("content while queued, failed, or gone", "409 without retry, 404 with a code, output_missing"),
    26: ("a running job is deleted", "ends within a step, gives its memory back"),
    27: ("kill -9 of the server, or of all", "jobs go on from their checkpoints, to the same frames"),
    28: ("kill -9 of the worker", "another takes over; no other job is touched, nothing is left behind"),
    29: ("a checkpoint that is damaged, cut, or another's", "dropped with a warning; the job begins anew"),
    30: ("kill -9 between writing, renaming and telling", "completed with its file, or made again; orphans are swept"),
    31: ("SIGTERM, once and twice", "503, checkpoint, exit 0 within the grace time; at once; no job is cancelled"),
    32: ("a full disk at upload, checkpoint, encoding, commit", "507; jobs wait, then fail with a code; it recovers"),
    33: ("a store damaged, newer, without its log, on NFS", "refused, or goes on whole; moved aside when asked"),
    34: ("two servers on one data folder", "each job is made once; or one has it for itself"),
    35: ("out of memory, a broken device, a hung step", "tried again with less, or in a new process; then a code"),
    36: ("damaged, foreign or half-built engines", "built again, never loaded"),
}
