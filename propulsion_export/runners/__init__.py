"""Each runtime as a callable from tensors to tensors.

| runner | runs | needs |
|---|---|---|
| `pytorch.torch_runner` | a torch module | torch |
| `pytorch.torch_decoder_runner` | a step of a causal language model and its cache | torch |
| `pytorch.torch_encoder_runner` | the encoder of an encoder-decoder | torch |
| `pytorch.torch_cross_decoder_runner` | a step of its decoder and its cache | torch |
| `graphs.onnxruntime_runner` | an ONNX file | onnxruntime |
| `graphs.reference_runner` | an ONNX file, slowly, in every dtype ONNX has | onnx |
| `graphs.tensorrt_runner` | an engine | a GPU, TensorRT or TensorRT-RTX, polygraphy |
"""
