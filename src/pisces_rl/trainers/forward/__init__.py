"""Methods that train on noised videos: NFT, AWM, RVM, Flow-DPO."""
