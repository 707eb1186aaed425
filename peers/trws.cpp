// Sequential tree-reweighted message passing on a 4-connected grid, single-threaded: the CPU peer of the benchmarks.
//
// Written from the published algorithm: V. Kolmogorov, "Convergent Tree-reweighted Message Passing for Energy
// Minimization", TPAMI 28(10), 2006, figure 3, with monotonic chains in raster order and one message per edge.
// Costs E(x) = sum theta_i(x_i) + sum w_ij g(|x_i - x_j|). Messages are floats, energies and bounds are doubles.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

enum Kind : int32_t { kWindow = 0, kTwoPassLinear = 1, kEnvelopeQuadratic = 2 };

// out(l) = min_m a(m) + w g(|l - m|), normalised to minimum 0; returns what was subtracted.
class MinPlus {
 public:
  MinPlus(int labels, int kind, const float* profile, int reach, float scale, float ceiling)
      : L(labels), kind(kind), profile(profile), R(reach), scale(scale), ceiling(ceiling), padded(labels + 2 * reach) {
    vertex.resize(L + 1);
    border.resize(L + 2);
  }

  float operator()(const float* a, float w, float* out) {
    float low = a[0];
    for (int l = 1; l < L; ++l) low = std::min(low, a[l]);
    switch (kind) {
      case kWindow: window(a, w, low, out); break;
      case kTwoPassLinear: two_pass(a, w, low, out); break;
      default: envelope(a, w, low, out);
    }
    // g(0) = 0 and g >= 0: the minimum of out is that of a.
    for (int l = 0; l < L; ++l) out[l] -= low;
    return low;
  }

 private:
  // A profile that is constant from distance R on: 2 R - 1 shifts and a floor. Without truncation R = L.
  void window(const float* a, float w, float low, float* out) {
    const float top = low + w * ceiling;
    for (int l = 0; l < L; ++l) out[l] = std::min(a[l], top);
    if (R <= 1) return;
    float* p = padded.data();
    std::fill(p, p + R, INFINITY);
    std::copy(a, a + L, p + R);
    std::fill(p + R + L, p + 2 * R + L, INFINITY);
    for (int d = 1; d < R; ++d) {
      const float cost = w * profile[d];
      const float *left = p + R - d, *right = p + R + d;
      for (int l = 0; l < L; ++l) out[l] = std::min(out[l], std::min(left[l], right[l]) + cost);
    }
  }

  // scale * min(d, T): Felzenszwalb and Huttenlocher's two passes, O(L).
  void two_pass(const float* a, float w, float low, float* out) {
    const float slope = w * scale, top = low + w * ceiling;
    out[0] = a[0];
    for (int l = 1; l < L; ++l) out[l] = std::min(a[l], out[l - 1] + slope);
    for (int l = L - 2; l >= 0; --l) out[l] = std::min(out[l], out[l + 1] + slope);
    for (int l = 0; l < L; ++l) out[l] = std::min(out[l], top);
  }

  // min(scale * d^2, ceiling): lower envelope of parabolas, O(L).
  void envelope(const float* a, float w, float low, float* out) {
    const float curve = w * scale, top = low + w * ceiling;
    if (curve <= 0) {
      std::fill(out, out + L, low);
      return;
    }
    int k = 0;
    vertex[0] = 0;
    border[0] = -INFINITY;
    border[1] = INFINITY;
    for (int q = 1; q < L; ++q) {
      float s;
      for (;;) {
        const int v = vertex[k];
        s = ((a[q] - a[v]) / curve + float(q) * q - float(v) * v) / (2.0f * (q - v));
        if (s > border[k]) break;
        --k;
      }
      vertex[++k] = q;
      border[k] = s;
      border[k + 1] = INFINITY;
    }
    for (int l = 0, at = 0; l < L; ++l) {
      while (border[at + 1] < l) ++at;
      const float d = l - vertex[at];
      out[l] = std::min(curve * d * d + a[vertex[at]], top);
    }
  }

  const int L, kind;
  const float* profile;
  const int R;
  const float scale, ceiling;
  std::vector<float> padded, border;
  std::vector<int> vertex;
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// theta (H, W, L); across (H, W - 1) and down (H - 1, W), or null for weights of 1; profile g(0..reach - 1) and its
// constant value from `reach` on, `ceiling` (huge where g is not truncated). Per iteration: bounds, energies of the labels
// rounded in raster order, and the seconds spent so far, without and with the rounding. labels (H, W) are the last ones.
extern "C" void trws(const float* theta, const float* across, const float* down, int32_t H, int32_t W, int32_t L,
                     int32_t kind, const float* profile, int32_t reach, float scale, float ceiling, int32_t iterations,
                     double* bounds, double* energies, double* pass_seconds, double* total_seconds, int32_t* labels) {
  const size_t pixels = size_t(H) * W;
  std::vector<float> right(pixels * L, 0.0f), below(pixels * L, 0.0f), belief(L), reduced(L), cost(L);
  MinPlus minplus(L, kind, profile, reach, scale, ceiling);
  auto weight_right = [&](int y, int x) { return across ? across[size_t(y) * (W - 1) + x] : 1.0f; };
  auto weight_below = [&](int y, int x) { return down ? down[size_t(y) * W + x] : 1.0f; };
  auto pair_cost = [&](int d) {
    if (kind == kWindow) return d < reach ? profile[d] : ceiling;
    return std::min(kind == kTwoPassLinear ? scale * d : scale * d * d, ceiling);
  };

  // One pass in raster order, or against it. Returns the bound that the pass proves (valid after the backward one).
  auto pass = [&](bool forward) {
    double bound = 0.0;
    for (size_t step = 0; step < pixels; ++step) {
      const size_t i = forward ? step : pixels - 1 - step;
      const int y = int(i / W), x = int(i % W);
      float* to_right = x + 1 < W ? &right[i * L] : nullptr;
      float* to_below = y + 1 < H ? &below[i * L] : nullptr;
      float* to_left = x > 0 ? &right[(i - 1) * L] : nullptr;
      float* to_above = y > 0 ? &below[(i - W) * L] : nullptr;
      const float* t = theta + i * L;
      float* b = belief.data();
      std::copy(t, t + L, b);
      for (const float* m : {to_right, to_below, to_left, to_above})
        if (m)
          for (int l = 0; l < L; ++l) b[l] += m[l];
      float low = b[0];
      for (int l = 1; l < L; ++l) low = std::min(low, b[l]);
      bound += low;
      const int after = (to_right != nullptr) + (to_below != nullptr), before = (to_left != nullptr) + (to_above != nullptr);
      const float gamma = 1.0f / std::max(after, before);
      auto send = [&](float* m, float w) {
        float* r = reduced.data();
        for (int l = 0; l < L; ++l) r[l] = gamma * (b[l] - low) - m[l];
        bound += minplus(r, w, m);
      };
      if (forward) {
        if (to_right) send(to_right, weight_right(y, x));
        if (to_below) send(to_below, weight_below(y, x));
      } else {
        if (to_left) send(to_left, weight_right(y, x - 1));
        if (to_above) send(to_above, weight_below(y - 1, x));
      }
    }
    return bound;
  };

  // Labels in raster order: the neighbours before are fixed, those after speak through their messages.
  auto round = [&]() {
    double energy = 0.0;
    for (size_t i = 0; i < pixels; ++i) {
      const int y = int(i / W), x = int(i % W);
      const float* t = theta + i * L;
      float *fixed = reduced.data(), *c = cost.data();
      std::copy(t, t + L, fixed);
      if (x > 0)
        for (int l = 0; l < L; ++l) fixed[l] += weight_right(y, x - 1) * pair_cost(std::abs(l - labels[i - 1]));
      if (y > 0)
        for (int l = 0; l < L; ++l) fixed[l] += weight_below(y - 1, x) * pair_cost(std::abs(l - labels[i - W]));
      std::copy(fixed, fixed + L, c);
      if (x + 1 < W)
        for (int l = 0; l < L; ++l) c[l] += right[i * L + l];
      if (y + 1 < H)
        for (int l = 0; l < L; ++l) c[l] += below[i * L + l];
      labels[i] = int32_t(std::min_element(c, c + L) - c);
      energy += fixed[labels[i]];
    }
    return energy;
  };

  double passes = 0.0, total = 0.0;
  for (int k = 0; k < iterations; ++k) {
    const double start = now();
    pass(true);
    bounds[k] = pass(false);
    const double swept = now();
    energies[k] = round();
    passes += swept - start;
    total += now() - start;
    pass_seconds[k] = passes;
    total_seconds[k] = total;
  }
}
