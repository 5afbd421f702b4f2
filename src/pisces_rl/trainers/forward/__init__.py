"""Methods that train on noised samples of the policy: NFT, AWM, RVM, Flow-DPO."""
