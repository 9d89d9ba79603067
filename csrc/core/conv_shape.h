// The problem in the letters of the design; Python validates it before it gets here.
#pragma once

namespace sk {

struct ConvShape {
  int N, C, H, W;  // input
  int K, R, S;     // filters
  int P, Q;        // output
  int stride_h, stride_w;
  int pad_top, pad_left;  // the far padding is implied by P and Q
  int dil_h, dil_w;
  int groups;

  int taps() const { return R * S; }
  int group_c() const { return C / groups; }
  int group_k() const { return K / groups; }
};

}  // namespace sk
