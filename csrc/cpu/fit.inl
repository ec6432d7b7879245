// Scales (and offsets) of groups of numbers, for encoding. A vector holds a number of each of L groups, so that every
// lane searches for its own group and sums have one order on every CPU.

namespace emoe::cpu {
namespace {

constexpr float kTenth = 0.1F;
constexpr int kRefined = 2;          // more roundings of the best of a search
constexpr int kSymmetricSteps = 19;  // 0, then nine levels less to nine more, in tenths

// numbers [groups][size] -> x [size][L]; lanes past `count` repeat the first group.
inline void load_groups(const FitGroups& fit, int64_t group, int count, float* x) {
    for (int l = 0; l < L; ++l) {
        const float* from = fit.numbers + (group + (l < count ? l : 0)) * fit.size;
        for (int64_t j = 0; j < fit.size; ++j) x[j * L + l] = from[j];
    }
}

inline V clamped(V a, float low, float high) { return vmin(vmax(a, vset(low)), vset(high)); }  // of a NaN: low

// As lanes of floats, where lanes go different ways.
struct Lanes {
    alignas(64) float f[L];
    Lanes() = default;
    explicit Lanes(V v) { vstore(f, v); }
    V v() const { return vload(f); }
};

// Codes of x, and the sums that least squares need.
struct Sums {
    Lanes codes, squares, products;  // of weight times: code, code^2, code * x
};

void fit_affine(const FitGroups& fit, int64_t group, int count) {
    const int64_t size = fit.size;
    const auto most = (float)fit.most;
    float* x = fit.scratch;
    float* weight = x + size * L;
    float* codes = weight + size * L;
    load_groups(fit, group, count, x);

    V high_v = vload(x);
    V low_v = vzero();
    V squares = vzero();
    for (int64_t j = 0; j < size; ++j) {
        const V v = vload(x + j * L);
        high_v = vmax(high_v, v);
        low_v = vmin(low_v, v);
        squares = vfma(v, v, squares);
    }
    Lanes root(vdiv(squares, vset((float)size)));
    for (float& each : root.f) each = __builtin_sqrtf(each);
    V sum_w_v = vzero();
    V sum_x_v = vzero();
    for (int64_t j = 0; j < size; ++j) {
        const V v = vload(x + j * L);
        const V w = vadd(root.v(), vmax(v, vsub(vzero(), v)));
        vstore(weight + j * L, w);
        sum_w_v = vadd(sum_w_v, w);
        sum_x_v = vfma(w, v, sum_x_v);
    }
    const Lanes high(high_v);
    const Lanes first_low(low_v);
    const Lanes sum_w(sum_w_v);
    const Lanes sum_x(sum_x_v);
    Lanes low(low_v);
    Lanes scale;
    Lanes least;
    Lanes levels;
    for (int l = 0; l < L; ++l) {
        scale.f[l] = (high.f[l] - low.f[l]) / most;
        levels.f[l] = most / (high.f[l] - low.f[l]);
    }

    const auto round_to = [&](Sums& sums) {  // `levels` a unit, from the least number on
        const V from = low.v();
        const V unit = levels.v();
        V c1 = vzero();
        V c2 = vzero();
        V cx = vzero();
        for (int64_t j = 0; j < size; ++j) {
            const V v = vload(x + j * L);
            const V code = vround(clamped(vmul(vsub(v, from), unit), 0, most));
            const V wc = vmul(vload(weight + j * L), code);
            c1 = vadd(c1, wc);
            c2 = vfma(wc, code, c2);
            cx = vfma(wc, v, cx);
            vstore(codes + j * L, code);
        }
        sums = {Lanes(c1), Lanes(c2), Lanes(cx)};
    };
    const auto error = [&](const Lanes& by, const Lanes& from) {  // from differences: sums of squares would cancel
        V sum = vzero();
        for (int64_t j = 0; j < size; ++j) {
            const V lost = vsub(vfma(vload(codes + j * L), by.v(), from.v()), vload(x + j * L));
            sum = vfma(vmul(vload(weight + j * L), lost), lost, sum);
        }
        return Lanes(sum);
    };

    Sums sums;
    round_to(sums);
    least = error(scale, low);
    for (int step = 0; step <= fit.steps + kRefined; ++step) {
        const float stretched = fit.first + kTenth * (float)step + most;
        for (int l = 0; l < L; ++l) {
            levels.f[l] = step <= fit.steps ? stretched / (high.f[l] - low.f[l]) : 1 / scale.f[l];
        }
        round_to(sums);
        Lanes fitted;
        Lanes offset;
        Lanes valid;
        for (int l = 0; l < L; ++l) {
            const float c1 = sums.codes.f[l];
            const float c2 = sums.squares.f[l];
            const float cx = sums.products.f[l];
            const float determinant = sum_w.f[l] * c2 - c1 * c1;
            const float slope = (sum_w.f[l] * cx - sum_x.f[l] * c1) / determinant;
            const float at_zero = (c2 * sum_x.f[l] - c1 * cx) / determinant;
            const bool above = at_zero > 0;  // an offset cannot be subtracted from below zero
            fitted.f[l] = above ? cx / c2 : slope;
            offset.f[l] = above ? 0 : at_zero;
            valid.f[l] = determinant > 0 ? 1.0F : 0.0F;
        }
        const Lanes found = error(fitted, offset);
        for (int l = 0; l < L; ++l) {
            const bool better = valid.f[l] > 0 && found.f[l] < least.f[l];
            least.f[l] = better ? found.f[l] : least.f[l];
            scale.f[l] = better ? fitted.f[l] : scale.f[l];
            low.f[l] = better ? offset.f[l] : low.f[l];
        }
    }
    for (int l = 0; l < L; ++l) {
        if (l >= count) break;                            // bounded by L, so that a compiler sees what was set
        const bool flat = !(high.f[l] > first_low.f[l]);  // all the same and not above zero: no scale
        fit.scale[group + l] = flat ? 0 : scale.f[l];
        fit.offset[group + l] = flat ? -first_low.f[l] : -low.f[l];
    }
}

void fit_symmetric(const FitGroups& fit, int64_t group, int count) {
    const int64_t size = fit.size;
    const auto most = (float)fit.most;
    float* x = fit.scratch;
    load_groups(fit, group, count, x);
    Lanes largest(vload(x));  // with its sign: there is one more code below zero
    for (int64_t j = 1; j < size; ++j) {
        for (int l = 0; l < L; ++l) {
            const float each = x[j * L + l];
            largest.f[l] = __builtin_fabsf(each) > __builtin_fabsf(largest.f[l]) ? each : largest.f[l];
        }
    }
    Lanes best(vzero());
    Lanes scale(vzero());
    for (int step = 0; step < kSymmetricSteps; ++step) {
        const int tenths = step == 0 ? 0 : step < 10 ? step - 10 : step - 9;
        Lanes levels;
        for (int l = 0; l < L; ++l) levels.f[l] = -(most + kTenth * (float)tenths) / largest.f[l];
        const V unit = levels.v();
        V cx_v = vzero();
        V c2_v = vzero();
        for (int64_t j = 0; j < size; ++j) {
            const V v = vload(x + j * L);
            const V code = vround(clamped(vmul(v, unit), -most, most - 1));
            const V wc = fit.squared ? vmul(vmul(v, v), code) : code;
            cx_v = vfma(wc, v, cx_v);
            c2_v = vfma(wc, code, c2_v);
        }
        const Lanes cx(cx_v);
        const Lanes c2(c2_v);
        for (int l = 0; l < L; ++l) {
            const bool better = c2.f[l] > 0 && cx.f[l] * cx.f[l] > best.f[l] * c2.f[l];
            const float fitted = cx.f[l] / c2.f[l];
            best.f[l] = better ? fitted * cx.f[l] : best.f[l];
            scale.f[l] = better ? fitted : scale.f[l];
        }
    }
    for (int l = 0; l < L; ++l) {
        if (l >= count) break;
        fit.scale[group + l] = largest.f[l] != 0 ? scale.f[l] : 0;
    }
}

}  // namespace
}  // namespace emoe::cpu
