from drllm.renamed import refuse

refuse(__spec__.name)
