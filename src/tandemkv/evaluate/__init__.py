"""What a policy that reads less than everything loses, on a model that needs its far context: `tandemkv eval`.

vocabulary -> formats -> tasks, prompts      what is asked
answers                                      how a system answers, from one dense prefill that all of them fork
ledger -> run -> report -> command           who takes part, every score, what it means
"""
