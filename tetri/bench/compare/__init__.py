"""tetri-cli bench: arrangements of the same CPUs, tetri's and vLLM's, serve the same requests in turn.

arrangements  which there are
servers       starts and stops one: vLLM's own servers, or a deployment of tetri
traffic       the requests: the paper's classes, sessions, traces
load          the client, over OpenAI's API; round robin or least outstanding among several servers
awake         keeps the machine from standing still, and notes when it did
plan          what to run, in which order
store         the runs that have ended, in a file, so that an interrupted comparison goes on
compare       runs the plan
predict       what the simulator says about the same requests
evidence      means, ratios and their intervals
report, plot  tables, words and pictures
"""
