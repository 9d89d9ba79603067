// What stands behind a classifier's convolutions: an average over the pixels, a flattened map, a linear layer. Between torch's
// own operators the caches have lost the interpreter: ResNet-56 spent .3 of 1.9 ms on three that take 20 us in a loop.
#pragma once
#include <cstdint>

#include "core/tensor.h"

namespace sk {

struct MapSize {
  int n, c, h, w;
};

// y[n, c] = mean of x[n, c, :, :]; float32, x's rows dense.
void average_pixels(const TensorView& x, const MapSize& size, const TensorView& y);

// y[n, (c * H + h) * W + w] = x[n, c, h, w]; float32, x's rows and y's features dense.
void flatten(const TensorView& x, const MapSize& size, const TensorView& y);

// y[n, k] = bias[k] + sum over c of weight[k, c] * x[n, c]; float32, features dense, bias may be null. For few images:
// every one of them reads the weight.
void linear(const TensorView& x, const float* weight, const float* bias, int images, int features,
            int outputs, const TensorView& y, int threads);

}  // namespace sk
