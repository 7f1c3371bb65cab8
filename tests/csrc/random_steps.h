// Random steps of programs, alone or each on the result of the one before, on allocations of exactly the size that the
// interface says, and what a plain computation in double makes of their inputs.
#ifndef COALESCER_FAST_TESTS_RANDOM_STEPS_H
#define COALESCER_FAST_TESTS_RANDOM_STEPS_H

#include <stdio.h>
#include <stdlib.h>

#include <functional>
#include <memory>

#include "random_calls.h"

namespace {

int64_t bytes_of(int64_t dtype) { return dtype == CF_UINT8 ? 1 : sizes[dtype]; }

double number_at(const char* p, int64_t dtype) {
    if (dtype == CF_UINT8) return static_cast<unsigned char>(*p);
    uint32_t bits = 0;
    memcpy(&bits, p, static_cast<size_t>(bytes_of(dtype)));
    if (dtype == CF_BFLOAT16) bits <<= 16;
    const int exponent = static_cast<int>(bits >> 10 & 31);  // no subnormal numbers are drawn
    if (dtype == CF_FLOAT16)
        return ldexp(static_cast<double>((bits & 0x3ff) + 0x400) * (bits & 0x8000 ? -1 : 1), exponent - 25);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

double number_of(const cf_vector& v, int64_t i, double absent) {
    return v.data ? number_at(static_cast<const char*>(v.data) + i * sizes[v.dtype], v.dtype) : absent;
}

// What a result may differ by from `exact`, which the computation is off from by no more than `error`, once it is
// rounded to the dtype.
double tolerance(double exact, double error, int64_t dtype) {
    return error * 1.01 + (fabs(exact) + error) * (dtype == CF_BFLOAT16 ? 0x1p-8 : 0x1p-23) + 1e-30;
}

void require_near(const char* name, double value, double exact, double error, int64_t dtype) {
    if (fabs(value - exact) <= tolerance(exact, error, dtype)) return;
    printf("%s: %.9g, expected %.9g to %.2g\n", name, value, exact, tolerance(exact, error, dtype));
    exit(1);
}

// Memory that a step reads or writes: no byte too many, and nothing before the first.
struct Memory {
    std::vector<char> bytes;
    bool written = false;  // by a step
    explicit Memory(int64_t size) : bytes(static_cast<size_t>(size), '\xff') {}
};

struct Image {
    std::shared_ptr<Memory> memory;
    cf_image image{};
    int64_t n = 0, height = 0, width = 0, channels = 0;

    int64_t pixel() const { return channels * bytes_of(image.dtype); }
    // Rows and columns from -border on.
    char* at(int64_t i, int64_t y, int64_t x, int64_t c) const {
        return static_cast<char*>(image.data) + i * image.sample + (y + image.border) * image.row +
               (x + image.border) * pixel() + c * bytes_of(image.dtype);
    }
    double number(int64_t i, int64_t y, int64_t x, int64_t c) const { return number_at(at(i, y, x, c), image.dtype); }
    bool dense() const { return !image.border && image.row == width * pixel() && image.sample == height * image.row; }
    template <class F>
    void each(const F& f) const {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t y = 0; y < height; ++y)
                for (int64_t x = 0; x < width; ++x)
                    for (int64_t c = 0; c < channels; ++c) f(i, y, x, c);
    }
    // The border has what it must, and nothing is written between the rows.
    void check_rest(const char* name, const uint8_t* zero) const {
        std::vector<bool> seen(memory->bytes.size());
        const int64_t b = image.border, size = bytes_of(image.dtype);
        bool right = true;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t y = -b; y < height + b; ++y)
                for (int64_t x = -b; x < width + b; ++x)
                    for (int64_t c = 0; c < channels; ++c) {
                        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
                        for (int64_t k = 0; k < size; ++k)
                            seen[static_cast<size_t>(at(i, y, x, c) + k - memory->bytes.data())] = true;
                        right = right && (inside || number(i, y, x, c) == (zero ? zero[c] : 0));
                    }
        for (size_t k = 0; k < seen.size(); ++k) right = right && (seen[k] || memory->bytes[k] == '\xff');
        if (right) return;
        printf("%s: a wrong border, or something written between rows\n", name);
        exit(1);
    }
};

// A program's steps in the making, and all that they point to.
struct Program {
    std::vector<cf_step> steps;
    std::vector<std::shared_ptr<void>> kept;
    std::vector<std::shared_ptr<Memory>> memories;
    std::vector<std::function<void()>> checks;  // of the last run
    std::vector<std::function<void()>> refusals;

    std::shared_ptr<Memory> memory(int64_t size, bool written) {
        memories.push_back(std::make_shared<Memory>(size));
        memories.back()->written = written;
        return memories.back();
    }
    // A copy of the arguments, for good.
    template <class Args>
    Args& add(int64_t kind, const Args& args) {
        auto copy = std::make_shared<Args>(args);
        kept.push_back(copy);
        steps.push_back({kind, copy.get()});
        return *copy;
    }
    // `change` makes arguments that must be refused.
    template <class Args, class F>
    void refuse(const char* what, int64_t kind, const Args& args, const F& change) {
        refusals.push_back([=] {
            Args wrong = args;
            change(wrong);
            const cf_step step{kind, &wrong};
            const cf_program_args program{&step, 1, 1};
            if (cf_cpu_run(&program) == CF_INVALID_ARGUMENT) return;
            printf("step kind %d: %s is taken\n", static_cast<int>(kind), what);
            exit(1);
        });
    }
    char* random(int64_t count, int64_t dtype, double scale = 1) {
        auto made = memory(count * bytes_of(dtype), false);
        for (int64_t i = 0; i < count; ++i) {
            char* to = made->bytes.data() + i * bytes_of(dtype);
            const float value = static_cast<float>(static_cast<double>(draw(-1000, 1000)) * 1e-3 * scale);
            uint32_t bits;
            memcpy(&bits, &value, 4);
            if (dtype == CF_UINT8) bits = static_cast<uint32_t>(draw(0, 255));
            if (dtype == CF_BFLOAT16) bits >>= 16;
            if (dtype == CF_FLOAT16) bits = static_cast<uint32_t>(draw(0, 1) << 15 | draw(0x2c00, 0x3bff));
            memcpy(to, &bits, static_cast<size_t>(bytes_of(dtype)));
        }
        return made->bytes.data();
    }
    const float* floats(int64_t count, double scale = 1) {
        return reinterpret_cast<const float*>(random(count, CF_FLOAT32, scale));
    }
    cf_vector vector(int64_t count, bool maybe = true) {
        if (maybe && draw(0, 2) == 0) return {nullptr, 0};
        const int64_t dtype = draw(0, 2);
        return {random(count, dtype), dtype};
    }
    Image image(int64_t n, int64_t height, int64_t width, int64_t channels, int64_t dtype, int64_t border, bool gaps,
                bool written) {
        Image made;
        made.n = n, made.height = height, made.width = width, made.channels = channels;
        const int64_t size = bytes_of(dtype), rows = height + 2 * border;
        made.image.dtype = dtype, made.image.border = border;
        made.image.row = (width + 2 * border) * channels * size + (gaps ? draw(0, 3) * size : 0);
        made.image.sample = rows * made.image.row + (gaps ? draw(0, 3) * size : 0);
        // up to its last element
        const int64_t bytes =
            n ? (n - 1) * made.image.sample + (rows - 1) * made.image.row + (width + 2 * border) * channels * size : 0;
        made.memory = memory(bytes, written);
        made.image.data = made.memory->bytes.data();
        if (!written && n) {
            for (int64_t i = 0; i < n; ++i)
                for (int64_t y = -border; y < height + border; ++y)
                    for (int64_t x = -border; x < width + border; ++x)
                        memset(made.at(i, y, x, 0), 0, static_cast<size_t>(made.pixel()));
            const char* values = random(n * height * width * channels, dtype);
            made.each([&](int64_t i, int64_t y, int64_t x, int64_t c) {
                memcpy(made.at(i, y, x, c), values, static_cast<size_t>(size));
                values += size;
            });
        }
        return made;
    }
};

// Vectors of outputs in a block of packed weights.
int64_t most_vectors(int64_t width) { return width == 16 ? 4 : (width == 8 ? 2 : 3); }
cf_quantisation quantisation(Program& p, int64_t channels) {
    float* inverse = reinterpret_cast<float*>(p.random(channels, CF_FLOAT32, 100));
    for (int64_t c = 0; c < channels; ++c) inverse[c] = fabsf(inverse[c]) * (draw(0, 9) ? 1.0f : 1e9f);
    return {inverse, reinterpret_cast<const uint8_t*>(p.random(channels, CF_UINT8))};
}

// `value` is `exact`, rounded to the dtype or, if it is quantised, to a code of channel c.
void require_stored(const char* name, double value, double exact, double error, int64_t dtype, const cf_quantisation& q,
                    int64_t c) {
    if (!q.inverse) return require_near(name, value, exact, error, dtype);
    const double code = fmin(fmax(exact * q.inverse[c] + q.zero[c], 0), 255);
    require_near(name, value, code, 0.501 + error * q.inverse[c], CF_FLOAT32);
}

bool multiplies(int64_t dtype) {
    return dtype == CF_FLOAT32 || (dtype == CF_BFLOAT16 && cf_cpu_products() & 1) ||
           (dtype == CF_UINT8 && cf_cpu_products() & 2);
}

// A function of cf_function.
double function_of(int64_t function, double v) {
    switch (function) {
        case CF_SILU:
            return v / (1 + exp(-v));
        case CF_TANH:
            return tanh(v);
        case CF_RELU:
            return v > 0 ? v : 0;
        case CF_GELU:
            return v * (1 + erf(v / sqrt(2))) / 2;
        case CF_GELU_TANH:
            return v * (1 + tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))) / 2;
        case CF_SIGMOID:
            return 1 / (1 + exp(-v));
        default:
            return v;
    }
}

Image convolution(Program& p, const Image& x, int64_t taps, int64_t border) {
    const int64_t stride = draw(1, 2), padding = taps == 9 && (draw(0, 3) || x.height < 2 || x.width < 2),
                  outputs = draw(0, 3) ? draw(1, 40) : draw(41, 150), width = cf_cpu_vector_width(), half = width / 2;
    const int64_t dtype = x.image.dtype, size = bytes_of(dtype), lanes = 4 / size, quads = x.channels / lanes, n = x.n;
    const int64_t y_dtypes[] = {CF_BFLOAT16, CF_BFLOAT16, CF_FLOAT32, CF_UINT8},
                  y_dtype = dtype == CF_FLOAT32 ? CF_FLOAT32 : y_dtypes[draw(0, 3)],
                  residual_dtype = y_dtype == CF_UINT8 ? CF_BFLOAT16 : y_dtype;
    // without padding, a 3x3 convolution reads the border at the bottom and on the right alone
    const int64_t cut = taps == 9 && !padding;
    const Image y = p.image(n, (x.height - 1 - cut) / stride + 1, (x.width - 1 - cut) / stride + 1, outputs, y_dtype,
                            border, draw(0, 1), true);
    const bool integers = dtype == CF_UINT8, gated = taps == 1 && draw(0, 3) == 0;
    // values and gates by turns
    const int64_t products = gated ? (outputs + half - 1) / half * width : outputs;
    const double scale = 1 / sqrt(static_cast<double>(taps * x.channels));
    const int64_t vectors = (products + width - 1) / width, most = most_vectors(width),
                  blocks = (vectors + most - 1) / most;
    // (products, taps, channels), then packed
    char* plain = p.random(products * taps * x.channels, dtype, scale);
    if (integers)  // up to the largest weight, at its limits every other time
        for (int64_t i = 0; i < products * taps * x.channels; ++i) {
            const int64_t most_weight = cf_cpu_largest_weight();
            plain[i] = static_cast<char>(draw(0, 1) ? draw(-most_weight, most_weight) : most_weight);
        }
    char* packed = p.memory(vectors * width * taps * x.channels * size, false)->bytes.data();
    char* to = packed;
    for (int64_t block = 0, first = 0; block < blocks; ++block) {
        const int64_t count = vectors / blocks + (block < vectors % blocks);
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t quad = 0; quad < quads; ++quad)
                for (int64_t output = first * width; output < (first + count) * width; ++output, to += 4) {
                    memset(to, 0, 4);
                    if (output < products)
                        memcpy(to, plain + ((output * taps + tap) * x.channels + quad * lanes) * size, 4);
                }
        first += count;
    }
    cf_convolution_args a{};
    a.x = x.image, a.y = y.image, a.weight = packed;
    a.bias = draw(0, 1) ? p.floats(products) : nullptr;
    a.scale = integers ? p.floats(products, 1e-4) : nullptr;
    Image residual;
    if (!gated && draw(0, 1))
        residual = p.image(n, y.height, y.width, outputs, residual_dtype, draw(0, 1), draw(0, 1), false);
    a.residual = residual.image;
    a.n = n, a.height = y.height, a.width = y.width, a.channels = x.channels, a.outputs = outputs, a.taps = taps,
    a.stride = stride, a.padding = padding;
    a.row = !gated && draw(0, 1) ? p.floats(n * outputs) : nullptr;
    a.relu = !gated && draw(0, 1);
    a.gated = gated, a.function = gated ? draw(CF_IDENTITY, CF_SIGMOID) : 0;
    if (y_dtype == CF_UINT8) a.quantisation = quantisation(p, outputs);
    p.add(CF_CONVOLUTION, a);
    p.checks.push_back([=] {
        y.check_rest("convolution", a.quantisation.zero);
        // the sum of output o with its bias, and what it may be off by
        const auto product = [&](int64_t i, int64_t r, int64_t q, int64_t o, double& error) {
            double sum = 0, absolute = 0;
            for (int64_t tap = 0; tap < taps; ++tap)
                for (int64_t c = 0; c < x.channels; ++c) {
                    const int64_t dy = taps == 9 ? tap / 3 - padding : 0, dx = taps == 9 ? tap % 3 - padding : 0;
                    const char* weight = plain + ((o * taps + tap) * x.channels + c) * size;
                    const double w = integers ? static_cast<signed char>(*weight) : number_at(weight, dtype);
                    const double term = x.number(i, r * stride + dy, q * stride + dx, c) * w;
                    sum += term, absolute += fabs(term);
                }
            const double factor = integers ? a.scale[o] : 1, bias = a.bias ? a.bias[o] : 0;
            // roundings of products and sums; the integers' sums are exact
            error = (integers ? 2 : static_cast<double>(2 * taps * x.channels)) * 0x1p-24 * absolute * fabs(factor) +
                    0x1p-22 * fabs(bias);
            return sum * factor + bias;
        };
        y.each([&](int64_t i, int64_t r, int64_t q, int64_t o) {
            double error;
            if (a.gated) {
                double gate_error;
                const int64_t at = o / half * width + o % half;
                const double value = product(i, r, q, at, error), gate = product(i, r, q, at + half, gate_error);
                const double f = function_of(a.function, gate);
                // no function is steeper than 1.13
                const double f_error = 1.13 * gate_error + 1e-6 * (0.1 + fabs(gate));
                require_stored("gated convolution", y.number(i, r, q, o), value * f,
                               fabs(value) * f_error + fabs(f) * error + error * f_error, y_dtype, a.quantisation, o);
                return;
            }
            const double row = a.row ? a.row[i * outputs + o] : 0, more = residual.n ? residual.number(i, r, q, o) : 0;
            double exact = product(i, r, q, o, error) + row + more;
            if (a.relu && !(exact > 0)) exact = 0;
            require_stored("convolution", y.number(i, r, q, o), exact, error + 0x1p-22 * (fabs(row) + fabs(more)),
                           y_dtype, a.quantisation, o);
        });
    });
    const auto refuse = [&](const char* what, void (*change)(cf_convolution_args&)) {
        p.refuse(what, CF_CONVOLUTION, a, change);
    };
    refuse("x's dtype", [](cf_convolution_args& w) { w.x.dtype = 4; });
    refuse("float16", [](cf_convolution_args& w) { w.x.dtype = w.y.dtype = CF_FLOAT16; });
    refuse("y's dtype", [](cf_convolution_args& w) { w.y.dtype = w.y.dtype == CF_UINT8 ? CF_FLOAT32 : CF_UINT8; });
    refuse("residual's dtype", [](cf_convolution_args& w) { w.residual = {&w, CF_UINT8, 0, 0, 0}; });
    refuse("n", [](cf_convolution_args& w) { w.n = -1; });
    refuse("height", [](cf_convolution_args& w) { w.height = -1; });
    refuse("width", [](cf_convolution_args& w) { w.width = 0; });
    refuse("channels", [](cf_convolution_args& w) { w.channels = 0; });
    refuse("outputs", [](cf_convolution_args& w) { w.outputs = 0; });
    refuse("taps", [](cf_convolution_args& w) { w.taps = 10; });
    refuse("stride", [](cf_convolution_args& w) { w.stride = 0; });
    refuse("a padding of two", [](cf_convolution_args& w) { w.padding = 2; });
    if (taps == 1) refuse("a padding of 1x1", [](cf_convolution_args& w) { w.padding = 1; });
    refuse("no border", [](cf_convolution_args& w) { w.taps = 9, w.x.border = 0; });
    refuse("a border of two", [](cf_convolution_args& w) { w.y.border = 2; });
    refuse("no weight", [](cf_convolution_args& w) { w.weight = nullptr; });
    refuse("no y", [](cf_convolution_args& w) { w.n = w.n ? w.n : 1, w.y.data = nullptr; });
    if (integers) refuse("no scale", [](cf_convolution_args& w) { w.scale = nullptr; });
    refuse("a gate of 3x3", [](cf_convolution_args& w) { w.gated = 1, w.taps = 9; });
    refuse("a gate after a function", [](cf_convolution_args& w) { w.gated = w.relu = 1; });
    if (gated) refuse("function", [](cf_convolution_args& w) { w.function = CF_SIGMOID + 1; });
    if (size < 4) refuse("odd channels", [](cf_convolution_args& w) { w.channels += 1; });
    return y;
}

// Of x and, perhaps, a skip of its own; y has x's dtype or 8 bits.
Image group_norm_image(Program& p, const Image& x, int64_t border, bool quantised) {
    const int64_t dtype = x.image.dtype, n = x.n, spatial = x.height * x.width, c1 = x.channels;
    int64_t groups = draw(1, 4), c2 = draw(0, 1) * draw(1, 20);
    c2 += c2 ? (groups - (c1 + c2) % groups) % groups : 0;
    while ((c1 + c2) % groups) --groups;
    const int64_t channels = c1 + c2;
    const Image y = p.image(n, x.height, x.width, channels, quantised ? static_cast<int64_t>(CF_UINT8) : dtype, border,
                            draw(0, 1), true);
    cf_group_norm_image_args a{};
    cf_group_norm_silu_args& norm = a.norm;
    norm.x = x.image.data, norm.skip = c2 ? p.random(n * spatial * c2, dtype) : nullptr;
    norm.dtype = dtype, norm.channels_last = 1, norm.n = n, norm.c1 = c1, norm.c2 = c2, norm.spatial = spatial,
    norm.groups = groups;
    norm.silu = draw(0, 1), norm.eps = 1e-5;
    norm.weight = p.vector(channels), norm.bias = p.vector(channels), norm.pre_bias = p.vector(channels);
    for (cf_vector* v : {&norm.scale, &norm.shift}) {
        const int64_t stride = channels + draw(0, 1) * draw(0, 9);
        *v = p.vector(n ? (n - 1) * stride + channels : 0);
        (v == &norm.scale ? norm.scale_stride : norm.shift_stride) = stride;
    }
    a.y = y.image, a.width = x.width;
    if (quantised) a.quantisation = quantisation(p, channels);
    p.add(CF_GROUP_NORM_SILU, a);
    p.checks.push_back([=] {
        const cf_group_norm_silu_args& k = a.norm;
        const auto input = [&](int64_t i, int64_t r, int64_t c) {
            const char* from =
                c < c1 ? static_cast<const char*>(k.x) + ((i * spatial + r) * c1 + c) * bytes_of(dtype)
                       : static_cast<const char*>(k.skip) + ((i * spatial + r) * c2 + c - c1) * bytes_of(dtype);
            return number_at(from, dtype) + number_of(k.pre_bias, c, 0);
        };
        y.check_rest("group_norm_silu", a.quantisation.zero);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t c = 0, per_group = channels / groups; c < channels; ++c) {
                const int64_t first = c / per_group * per_group;
                double mean = 0, square = 0, most = 0;
                for (int64_t o = first; o < first + per_group; ++o)
                    for (int64_t r = 0; r < spatial; ++r) {
                        mean += input(i, r, o);
                        most = fmax(most, fabs(input(i, r, o)) + fabs(number_of(k.pre_bias, o, 0)));
                    }
                mean /= static_cast<double>(per_group * spatial);
                for (int64_t o = first; o < first + per_group; ++o)
                    for (int64_t r = 0; r < spatial; ++r) square += (input(i, r, o) - mean) * (input(i, r, o) - mean);
                const double inverse = 1 / sqrt(square / static_cast<double>(per_group * spatial) + k.eps);
                const double gain = 1 + number_of(k.scale, i * k.scale_stride + c, 0),
                             factor = inverse * number_of(k.weight, c, 1) * gain;
                const double offset = number_of(k.bias, c, 0) * gain + number_of(k.shift, i * k.shift_stride + c, 0);
                for (int64_t r = 0; r < spatial; ++r) {
                    double exact = (input(i, r, c) - mean) * factor + offset;
                    if (k.silu) exact /= 1 + exp(-exact);
                    const double error = 1e-5 * (most * fabs(factor) + fabs(offset)) + 1e-6;
                    const double got = y.number(i, r / x.width, r % x.width, c);
                    require_stored("group_norm_silu", got, exact, error, dtype, a.quantisation, c);
                }
            }
    });
    const auto refuse = [&](const char* what, void (*change)(cf_group_norm_image_args&)) {
        p.refuse(what, CF_GROUP_NORM_SILU, a, change);
    };
    refuse("dtype", [](cf_group_norm_image_args& w) { w.norm.dtype = CF_UINT8; });
    refuse("float16", [](cf_group_norm_image_args& w) { w.norm.dtype = w.y.dtype = CF_FLOAT16; });
    refuse("y's dtype",
           [](cf_group_norm_image_args& w) { w.y.dtype = w.norm.dtype == CF_FLOAT32 ? CF_BFLOAT16 : CF_FLOAT32; });
    refuse("n", [](cf_group_norm_image_args& w) { w.norm.n = -1; });
    refuse("c1", [](cf_group_norm_image_args& w) { w.norm.c1 = 0; });
    refuse("c2", [](cf_group_norm_image_args& w) { w.norm.c2 = -1; });
    refuse("groups", [](cf_group_norm_image_args& w) { w.norm.groups = 0; });
    refuse("eps", [](cf_group_norm_image_args& w) { w.norm.eps = -1; });
    refuse("spatial", [](cf_group_norm_image_args& w) { w.norm.spatial = 0; });
    refuse("width", [](cf_group_norm_image_args& w) { w.width = 0; });
    refuse("a part of a row", [](cf_group_norm_image_args& w) { w.width = w.norm.spatial + 1; });
    refuse("weight's dtype", [](cf_group_norm_image_args& w) { w.norm.weight = {w.norm.x ? w.norm.x : &w, CF_UINT8}; });
    refuse("border", [](cf_group_norm_image_args& w) { w.y.border = -1; });
    refuse("half a quantisation", [](cf_group_norm_image_args& w) {
        static const float one = 1;
        w.quantisation.inverse = w.quantisation.inverse ? nullptr : &one;
    });
    return y;
}

// Of x and, perhaps, another of any layout and dtype, or of an image alone in such a layout.
Image gather(Program& p, const Image* x, int64_t n, int64_t dtype, int64_t border) {
    const int64_t height = x ? x->height : draw(1, 6), width = x ? x->width : draw(1, 6);
    const bool resized = draw(0, 2) == 0;
    const int64_t to_height = resized ? draw(1, 14) : height, to_width = resized ? draw(1, 14) : width;
    cf_gather_args a{};
    for (int i = 0; i < 2; ++i) {
        if (i == 0 && x) {
            const int64_t size = bytes_of(x->image.dtype);
            a.channels[0] = x->channels;
            a.parts[0] = {n ? x->at(0, 0, 0, 0) : nullptr,
                          x->image.dtype,
                          {x->image.sample / size, 1, x->image.row / size, x->channels}};
        } else if (i == 0 || draw(0, 1)) {
            const int64_t c = a.channels[i] = draw(1, 40), part_dtype = draw(0, 2);
            a.parts[i] = {
                p.random(n * c * height * width, part_dtype), part_dtype, {c * height * width, 1, c * width, c}};
            if (draw(0, 1))
                a.parts[i].strides[1] = height * width, a.parts[i].strides[2] = width, a.parts[i].strides[3] = 1;
        }
    }
    const int64_t lanes = 4 / bytes_of(dtype), channels = a.channels[0] + a.channels[1];
    a.y_channels = draw(0, 1) ? (channels + lanes - 1) / lanes * lanes : channels + draw(0, 3);
    const Image y = p.image(n, to_height, to_width, a.y_channels, dtype, border, draw(0, 1), true);
    if (dtype == CF_UINT8) a.quantisation = quantisation(p, a.y_channels);
    a.y = y.image, a.n = n, a.height = y.height, a.width = y.width, a.from_height = height, a.from_width = width;
    a.y_scale = static_cast<double>(height) / static_cast<double>(to_height);
    a.x_scale = static_cast<double>(width) / static_cast<double>(to_width);
    const auto nearest = [](int64_t i, double scale, int64_t size) {
        const int64_t found = static_cast<int64_t>(floorf(static_cast<float>(i) * static_cast<float>(scale)));
        return found < size ? found : size - 1;
    };
    p.add(CF_GATHER, a);
    p.checks.push_back([=] {
        y.check_rest("gather", a.quantisation.zero);
        y.each([&](int64_t i, int64_t r, int64_t q, int64_t c) {
            double exact = 0;
            if (c < channels) {
                const int second = c >= a.channels[0];
                const cf_tensor4& t = a.parts[second];
                const int64_t at[] = {i, c - second * a.channels[0], nearest(r, a.y_scale, height),
                                      nearest(q, a.x_scale, width)};
                int64_t offset = 0;
                for (int d = 0; d < 4; ++d) offset += at[d] * t.strides[d];
                exact = number_at(static_cast<const char*>(t.data) + offset * sizes[t.dtype], t.dtype);
            }
            require_stored("gather", y.number(i, r, q, c), exact, 0, dtype, a.quantisation, c);
        });
    });
    const auto refuse = [&](const char* what, void (*change)(cf_gather_args&)) {
        p.refuse(what, CF_GATHER, a, change);
    };
    refuse("a part's dtype", [](cf_gather_args& w) { w.parts[0] = {&w, CF_UINT8, {}}; });
    refuse("y's dtype", [](cf_gather_args& w) { w.y.dtype = w.y.dtype == CF_UINT8 ? CF_FLOAT32 : CF_UINT8; });
    refuse("half a quantisation", [](cf_gather_args& w) {
        w.quantisation.zero = w.quantisation.zero ? nullptr : reinterpret_cast<const uint8_t*>(&w);
    });
    refuse("n", [](cf_gather_args& w) { w.n = -1; });
    refuse("height", [](cf_gather_args& w) { w.height = 0; });
    refuse("from_height", [](cf_gather_args& w) { w.from_height = 0; });
    refuse("from_width", [](cf_gather_args& w) { w.from_width = -1; });
    refuse("a scale", [](cf_gather_args& w) { w.x_scale = -1; });
    refuse("channels", [](cf_gather_args& w) { w.channels[1] = -1; });
    refuse("too few channels", [](cf_gather_args& w) { w.y_channels = w.channels[0] + w.channels[1] - 1; });
    refuse("no part", [](cf_gather_args& w) { w.n = 1, w.parts[0].data = nullptr; });
    refuse("border", [](cf_gather_args& w) { w.y.border = 3; });
    return y;
}

// Of queries, keys and values that lie beside each other in x, which is dense, or anywhere.
Image attention(Program& p, const Image* x, int64_t n, int64_t dtype) {
    const int64_t lanes = 4 / bytes_of(dtype);
    cf_attention_args a{};
    a.n = n, a.dtype = dtype, a.heads = x ? 1 : draw(1, 3), a.length = x ? x->height * x->width : draw(1, 20);
    a.width = x ? x->channels / 3 : draw(1, 20) * lanes, a.k_length = x ? a.length : draw(1, 70);
    int64_t part = 0;
    for (cf_heads* h : {&a.q, &a.k, &a.v}) {
        const int64_t rows = h == &a.q ? a.length : a.k_length;
        if (x) {
            *h = {n ? x->at(0, 0, 0, part++ * a.width) : nullptr, x->height * x->width * x->channels, 0, x->channels};
            continue;
        }
        const bool heads_first = draw(0, 1);
        h->row = (heads_first ? 1 : a.heads) * a.width + draw(0, 3),
        h->head_stride = heads_first ? rows * h->row : a.width;
        h->sample = (heads_first ? a.heads * h->head_stride : rows * h->row) + draw(0, 3);
        h->data = p.random(n ? (n - 1) * h->sample + (a.heads - 1) * h->head_stride + (rows - 1) * h->row + a.width : 0,
                           dtype, 2);
    }
    if (draw(0, 1)) {
        char* mask = p.random(n * a.k_length, CF_UINT8);
        const int64_t some = draw(0, 3);  // keys, or none
        for (int64_t i = 0; i < n * a.k_length; ++i) mask[i] = some && (i % a.k_length == 0 || mask[i] % 3);
        a.mask = reinterpret_cast<const uint8_t*>(mask);
    }
    a.scale = 1 / sqrt(static_cast<double>(a.width));
    if (draw(0, 2) == 0) {
        a.bias.row = draw(0, 1) ? a.k_length : 0, a.bias.head_stride = draw(0, 1) ? a.length * a.k_length : 0;
        a.bias.sample = a.heads * a.length * a.k_length;
        a.bias.data = p.random(n * a.bias.sample, CF_FLOAT32);
    }
    const auto bias_at = [=](int64_t i, int64_t head, int64_t row, int64_t key) {
        const int64_t at = i * a.bias.sample + head * a.bias.head_stride + row * a.bias.row + key;
        return a.bias.data ? static_cast<double>(static_cast<const float*>(a.bias.data)[at]) : 0.0;
    };
    const bool quantised = draw(0, 2) == 0;
    const Image y =
        p.image(n, 1, a.length, a.heads * a.width, quantised ? static_cast<int64_t>(CF_UINT8) : dtype, 0, false, true);
    if (quantised) a.quantisation = quantisation(p, a.heads * a.width);
    a.y = y.image.data;
    p.add(CF_ATTENTION, a);
    p.checks.push_back([=] {
        const auto element = [&](const cf_heads& h, int64_t i, int64_t head, int64_t row, int64_t d) {
            const int64_t at = i * h.sample + head * h.head_stride + row * h.row + d;
            return number_at(static_cast<const char*>(h.data) + at * bytes_of(dtype), dtype);
        };
        std::vector<double> weights(static_cast<size_t>(a.k_length));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t head = 0; head < a.heads; ++head)
                for (int64_t row = 0; row < a.length; ++row) {
                    double most = -HUGE_VAL, absolute = 0, total = 0;
                    for (int64_t key = 0; key < a.k_length; ++key) {
                        double score = 0, size = 0;
                        for (int64_t d = 0; d < a.width; ++d) {
                            const double product =
                                element(a.q, i, head, row, d) * element(a.k, i, head, key, d) * a.scale;
                            score += product, size += fabs(product);
                        }
                        score += bias_at(i, head, row, key), size += fabs(bias_at(i, head, row, key));
                        weights[static_cast<size_t>(key)] = a.mask && !a.mask[i * a.k_length + key] ? -HUGE_VAL : score;
                        most = fmax(most, weights[static_cast<size_t>(key)]), absolute = fmax(absolute, size);
                    }
                    for (double& weight : weights) total += weight = most == -HUGE_VAL ? 0 : exp(weight - most);
                    const double score_error = 0x1p-23 * static_cast<double>(a.width + 4) * absolute;
                    const double rounding =
                        1e-6 + 0x1p-22 * static_cast<double>(a.k_length) + (dtype == CF_BFLOAT16 ? 0x1p-8 : 0);
                    const double relative = 4 * score_error + rounding;
                    for (int64_t d = 0; d < a.width; ++d) {
                        double exact = 0, size = 0;
                        for (int64_t key = 0; key < a.k_length; ++key) {
                            const double weight = weights[static_cast<size_t>(key)] / (total > 0 ? total : 1);
                            const double product = weight * element(a.v, i, head, key, d);
                            exact += product, size += fabs(product);
                        }
                        require_stored("attention", y.number(i, 0, row, head * a.width + d), exact, relative * size,
                                       dtype, a.quantisation, head * a.width + d);
                    }
                }
    });
    const auto refuse = [&](const char* what, void (*change)(cf_attention_args&)) {
        p.refuse(what, CF_ATTENTION, a, change);
    };
    refuse("dtype", [](cf_attention_args& w) { w.dtype = CF_UINT8; });
    refuse("n", [](cf_attention_args& w) { w.n = -1; });
    refuse("heads", [](cf_attention_args& w) { w.heads = 0; });
    refuse("length", [](cf_attention_args& w) { w.length = -5; });
    refuse("k_length", [](cf_attention_args& w) { w.k_length = 0; });
    refuse("width", [](cf_attention_args& w) { w.width = 0; });
    refuse("half a quantisation", [](cf_attention_args& w) {
        w.quantisation.zero = w.quantisation.zero ? nullptr : reinterpret_cast<const uint8_t*>(&w);
    });
    refuse("no keys", [](cf_attention_args& w) { w.n = 1, w.k.data = nullptr; });
    if (dtype == CF_BFLOAT16) refuse("an odd width", [](cf_attention_args& w) { w.width -= 1; });
    return y;
}

// Rows of x, dense.
Image layer_norm(Program& p, const Image& x) {
    const bool quantised = draw(0, 2) == 0;
    const Image y = p.image(x.n, x.height, x.width, x.channels,
                            quantised ? static_cast<int64_t>(CF_UINT8) : x.image.dtype, 0, false, true);
    cf_layer_norm_args a{};
    if (quantised) a.quantisation = quantisation(p, x.channels);
    a.x = x.image.data, a.y = y.image.data, a.dtype = x.image.dtype, a.rows = x.n * x.height * x.width,
    a.channels = x.channels;
    a.weight = p.floats(x.channels), a.bias = p.floats(x.channels), a.eps = 1e-5;
    p.add(CF_LAYER_NORM, a);
    p.checks.push_back([=] {
        const double channels = static_cast<double>(x.channels);
        y.each([&](int64_t i, int64_t r, int64_t q, int64_t c) {
            double mean = 0, square = 0, most = 0;
            for (int64_t o = 0; o < x.channels; ++o)
                mean += x.number(i, r, q, o) / channels, most = fmax(most, fabs(x.number(i, r, q, o)));
            for (int64_t o = 0; o < x.channels; ++o)
                square += (x.number(i, r, q, o) - mean) * (x.number(i, r, q, o) - mean) / channels;
            const double inverse = 1 / sqrt(square + a.eps),
                         exact = (x.number(i, r, q, c) - mean) * inverse * a.weight[c] + a.bias[c];
            const double error = (channels + 8) * 0x1p-23 * (2 * most * inverse * fabs(a.weight[c]) + fabs(a.bias[c]));
            require_stored("layer_norm", y.number(i, r, q, c), exact, error, a.dtype, a.quantisation, c);
        });
    });
    const auto refuse = [&](const char* what, void (*change)(cf_layer_norm_args&)) {
        p.refuse(what, CF_LAYER_NORM, a, change);
    };
    refuse("dtype", [](cf_layer_norm_args& w) { w.dtype = CF_FLOAT16; });
    refuse("rows", [](cf_layer_norm_args& w) { w.rows = -1; });
    refuse("channels", [](cf_layer_norm_args& w) { w.channels = 0; });
    refuse("no weight", [](cf_layer_norm_args& w) { w.weight = nullptr; });
    refuse("eps", [](cf_layer_norm_args& w) { w.eps = -1; });
    refuse("half a quantisation",
           [](cf_layer_norm_args& w) { w.quantisation.inverse = w.quantisation.inverse ? nullptr : w.weight; });
    return y;
}

// Of the halves of x's channels, dense and even.
Image gate(Program& p, const Image& x) {
    const int64_t half = x.channels / 2;
    const bool quantised = draw(0, 2) == 0;
    const Image y = p.image(x.n, x.height, x.width, half, quantised ? static_cast<int64_t>(CF_UINT8) : x.image.dtype, 0,
                            false, true);
    cf_gate_args a{};
    if (quantised) a.quantisation = quantisation(p, half);
    a.value = x.image.data, a.gate = x.n ? x.at(0, 0, 0, half) : x.image.data, a.y = y.image.data,
    a.dtype = x.image.dtype;
    a.rows = x.n * x.height * x.width, a.channels = half, a.value_stride = a.gate_stride = x.channels;
    a.function = draw(CF_IDENTITY, CF_SIGMOID);
    p.add(CF_GATE, a);
    p.checks.push_back([=] {
        y.each([&](int64_t i, int64_t r, int64_t q, int64_t c) {
            const double value = x.number(i, r, q, c), g = x.number(i, r, q, half + c);
            require_stored("gate", y.number(i, r, q, c), value * function_of(a.function, g),
                           1e-6 * fabs(value) * (0.1 + fabs(g)), a.dtype, a.quantisation, c);
        });
    });
    const auto refuse = [&](const char* what, void (*change)(cf_gate_args&)) { p.refuse(what, CF_GATE, a, change); };
    refuse("dtype", [](cf_gate_args& w) { w.dtype = 17; });
    refuse("rows", [](cf_gate_args& w) { w.rows = -1; });
    refuse("channels", [](cf_gate_args& w) { w.channels = 0; });
    refuse("function", [](cf_gate_args& w) { w.function = CF_SIGMOID + 1; });
    refuse("half a quantisation", [](cf_gate_args& w) {
        w.quantisation.zero = w.quantisation.zero ? nullptr : reinterpret_cast<const uint8_t*>(&w);
    });
    refuse("no gate", [](cf_gate_args& w) { w.rows = 1, w.gate = nullptr; });
    return y;
}

// Of all elements of x, dense, with another image of its shape added or not.
Image pointwise(Program& p, const Image& x) {
    const int64_t dtype = x.image.dtype, function = draw(CF_IDENTITY, CF_SIGMOID);
    const Image y = p.image(x.n, x.height, x.width, x.channels, dtype, 0, false, true);
    const Image added = p.image(x.n, x.height, x.width, x.channels, dtype, 0, false, false);
    cf_pointwise_args a{};
    a.x = x.image.data, a.y = y.image.data, a.residual = draw(0, 1) && x.n ? added.image.data : nullptr;
    a.dtype = dtype, a.count = x.n * x.height * x.width * x.channels, a.function = function;
    const auto number = [] { return static_cast<double>(draw(-64, 64)) / 32; };  // exact in float
    a.x_scale = number(), a.x_shift = number(), a.y_scale = number(), a.y_shift = number();
    p.add(CF_POINTWISE, a);
    p.checks.push_back([=] {
        y.each([&](int64_t i, int64_t r, int64_t q, int64_t c) {
            const double product = x.number(i, r, q, c) * a.x_scale, v = product + a.x_shift;
            const double f = function_of(function, v);
            const double other = a.residual ? added.number(i, r, q, c) : 0, exact = f * a.y_scale + a.y_shift + other;
            // no function is steeper than 1.13
            const double error = 0x1p-22 * (1.13 * (fabs(product) + fabs(a.x_shift)) + fabs(f) + 0.1) * fabs(a.y_scale);
            require_near("pointwise", y.number(i, r, q, c), exact,
                         error + 0x1p-23 * (fabs(f * a.y_scale) + fabs(a.y_shift)), dtype);
        });
    });
    const auto refuse = [&](const char* what, void (*change)(cf_pointwise_args&)) {
        p.refuse(what, CF_POINTWISE, a, change);
    };
    refuse("dtype", [](cf_pointwise_args& w) { w.dtype = CF_FLOAT16; });
    refuse("count", [](cf_pointwise_args& w) { w.count = -1; });
    refuse("function", [](cf_pointwise_args& w) { w.function = CF_SIGMOID + 1; });
    refuse("a function below 0", [](cf_pointwise_args& w) { w.function = -1; });
    refuse("no x", [](cf_pointwise_args& w) { w.count = 1, w.x = nullptr; });
    return y;
}

// Of all channels of x, dense, with vectors of any dtype, for each sample or for all.
Image modulate(Program& p, const Image& x) {
    const Image y = p.image(x.n, x.height, x.width, x.channels, x.image.dtype, 0, false, true);
    cf_modulate_args a{};
    a.x = x.image.data, a.y = y.image.data, a.dtype = x.image.dtype, a.plus = draw(0, 1);
    a.n = x.n, a.spatial = x.height * x.width, a.channels = x.channels;
    for (auto [vector, stride] : {std::pair{&a.scale, &a.scale_stride}, std::pair{&a.shift, &a.shift_stride}}) {
        if (draw(0, 3) == 0) continue;
        *stride = draw(0, 1) ? x.channels : 0, vector->dtype = draw(0, 2);
        vector->data = p.random(*stride ? x.n * x.channels : x.channels, vector->dtype);
    }
    p.add(CF_MODULATE, a);
    p.checks.push_back([=] {
        y.each([&](int64_t i, int64_t r, int64_t q, int64_t c) {
            const auto number = [&](const cf_vector& v, int64_t stride) {
                const int64_t at = i * stride + c;
                return number_at(static_cast<const char*>(v.data) + at * sizes[v.dtype], v.dtype);
            };
            const double scale = a.scale.data ? number(a.scale, a.scale_stride) + a.plus : 1;
            const double shift = a.shift.data ? number(a.shift, a.shift_stride) : 0, value = x.number(i, r, q, c);
            require_near("modulate", y.number(i, r, q, c), value * scale + shift,
                         0x1p-22 * (fabs(value) * (fabs(scale) + 1) + fabs(shift)), a.dtype);
        });
    });
    const auto refuse = [&](const char* what, void (*change)(cf_modulate_args&)) {
        p.refuse(what, CF_MODULATE, a, change);
    };
    refuse("dtype", [](cf_modulate_args& w) { w.dtype = CF_FLOAT16; });
    refuse("n", [](cf_modulate_args& w) { w.n = -1; });
    refuse("spatial", [](cf_modulate_args& w) { w.spatial = 0; });
    refuse("channels", [](cf_modulate_args& w) { w.channels = 0; });
    refuse("scale's dtype", [](cf_modulate_args& w) { w.scale = {&w, CF_UINT8}; });
    refuse("no x", [](cf_modulate_args& w) { w.n = 1, w.x = nullptr; });
    return y;
}

// Rows of x, dense and float32, some of which are made zero.
Image replace_zero_rows(Program& p, const Image& x) {
    const Image y = p.image(x.n, x.height, x.width, x.channels, CF_FLOAT32, 0, false, true);
    cf_replace_zero_rows_args a{};
    a.x = reinterpret_cast<const float*>(x.image.data), a.y = reinterpret_cast<float*>(y.image.data),
    a.row = p.floats(x.channels);
    a.rows = x.n * x.height * x.width, a.channels = x.channels;
    for (int64_t r = 0; r < a.rows; ++r)
        if (draw(0, 1)) memset(static_cast<char*>(x.image.data) + r * x.pixel(), 0, static_cast<size_t>(x.pixel()));
    p.add(CF_REPLACE_ZERO_ROWS, a);
    p.checks.push_back([=] {
        y.each([&](int64_t i, int64_t r, int64_t q, int64_t c) {
            bool zero = true;
            for (int64_t o = 0; o < x.channels; ++o) zero = zero && x.number(i, r, q, o) == 0;
            require_near("replace_zero_rows", y.number(i, r, q, c), zero ? a.row[c] : x.number(i, r, q, c), 0,
                         CF_FLOAT32);
        });
    });
    const auto refuse = [&](const char* what, void (*change)(cf_replace_zero_rows_args&)) {
        p.refuse(what, CF_REPLACE_ZERO_ROWS, a, change);
    };
    refuse("rows", [](cf_replace_zero_rows_args& w) { w.rows = -1; });
    refuse("channels", [](cf_replace_zero_rows_args& w) { w.channels = 0; });
    refuse("no row", [](cf_replace_zero_rows_args& w) { w.row = nullptr; });
    refuse("no y", [](cf_replace_zero_rows_args& w) { w.rows = 1, w.y = nullptr; });
    return y;
}

// Weights are packed in the order that the interface says, whatever their strides, by one thread and by three.
void packs(bool large) {
    const int64_t dtypes[] = {CF_FLOAT32, CF_BFLOAT16, CF_UINT8};
    cf_pack_args a{};
    a.dtype = dtypes[draw(0, 2)], a.outputs = draw(1, 150), a.channels = draw(1, large ? 90 : 20);
    a.height = draw(1, 3), a.width = draw(1, 3);
    const bool integers = a.dtype == CF_UINT8;
    const int64_t taps = a.height * a.width, count = a.outputs * a.channels * taps;
    Buffer weight = numbers(count, draw(0, 2));
    a.weight = any_layout(weight, a.channels, a.height, a.width);
    Buffer step = numbers(a.channels, CF_FLOAT32), scale = numbers(a.outputs, CF_FLOAT32);
    std::vector<float> zero;
    for (int64_t c = 0; c < a.channels; ++c) zero.push_back(static_cast<float>(draw(0, 255)));
    const auto at = [](Buffer& b) { return reinterpret_cast<float*>(b.data()); };
    for (int64_t o = 0; o < a.outputs; ++o) at(scale)[o] = 0.1f + fabsf(at(scale)[o]);
    std::vector<int64_t> sums(static_cast<size_t>(a.outputs), -1), expected_sums(sums.size());
    if (integers) a.step = at(step), a.scale = at(scale), a.zero = zero.data(), a.sums = sums.data();

    const int64_t width = cf_cpu_vector_width(), most = most_vectors(width), lanes = 4 / bytes_of(a.dtype);
    const int64_t vectors = (a.outputs + width - 1) / width, units = (a.channels + lanes - 1) / lanes,
                  blocks = (vectors + most - 1) / most;
    std::vector<char> results[2];
    for (std::vector<char>& packed : results) {
        packed.assign(static_cast<size_t>(vectors * width * taps * units * 4), '\xff');
        a.packed = packed.data(), a.threads = &packed == results ? 1 : 3;
        if (cf_cpu_pack(&a) != CF_OK) printf("pack: refused\n"), exit(1);
    }
    if (results[0] != results[1]) printf("pack: three threads have another result than one\n"), exit(1);
    const char* p = results[0].data();
    for (int64_t block = 0, first = 0; block < blocks; ++block) {
        const int64_t size = vectors / blocks + (block < vectors % blocks);
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t u = 0; u < units; ++u)
                for (int64_t o = first * width; o < (first + size) * width; ++o)
                    for (int64_t lane = 0; lane < lanes; ++lane, p += bytes_of(a.dtype)) {
                        const int64_t c = u * lanes + lane;
                        double exact = 0;
                        if (o < a.outputs && c < a.channels) {
                            const int64_t* s = a.weight.strides;
                            exact = number_at(
                                weight.data() + sizes[weight.dtype] *
                                                    (o * s[0] + c * s[1] + tap / a.width * s[2] + tap % a.width * s[3]),
                                weight.dtype);
                            if (integers) exact = exact * at(step)[c] / at(scale)[o];
                        }
                        const double value = integers ? static_cast<signed char>(*p) : number_at(p, a.dtype);
                        require_near("pack", value, exact, integers ? 0.5001 : 0, a.dtype);
                        if (integers && o < a.outputs && c < a.channels)
                            expected_sums[static_cast<size_t>(o)] +=
                                static_cast<int64_t>(value * static_cast<double>(zero[static_cast<size_t>(c)]));
                    }
        first += size;
    }
    if (integers && sums != expected_sums) printf("pack: wrong sums\n"), exit(1);

    const auto refuse = [a](const char* what, void (*change)(cf_pack_args&)) {
        cf_pack_args wrong = a;
        change(wrong);
        if (cf_cpu_pack(&wrong) != CF_INVALID_ARGUMENT) printf("pack: %s is taken\n", what), exit(1);
    };
    refuse("dtype", [](cf_pack_args& w) { w.dtype = CF_FLOAT16; });
    refuse("the weight's dtype", [](cf_pack_args& w) { w.weight.dtype = CF_UINT8; });
    refuse("no weight", [](cf_pack_args& w) { w.weight.data = nullptr; });
    refuse("no result", [](cf_pack_args& w) { w.packed = nullptr; });
    refuse("outputs", [](cf_pack_args& w) { w.outputs = 0; });
    refuse("channels", [](cf_pack_args& w) { w.channels = 0; });
    refuse("height", [](cf_pack_args& w) { w.height = 0; });
    refuse("width", [](cf_pack_args& w) { w.width = 0; });
    refuse("no sums", [](cf_pack_args& w) { w.dtype = CF_UINT8, w.sums = nullptr; });
}

// A fingerprint is that of the places that the interface says, and of no byte beside them.
void fingerprints() {
    const int64_t whole = draw(0, 90), samples = draw(2, 9), count = draw(0, 3);
    std::vector<std::vector<char>> data;
    std::vector<cf_span> spans;
    for (int64_t i = 0; i < count; ++i) {
        data.emplace_back(static_cast<size_t>(draw(0, 400)));
        for (char& byte : data.back()) byte = static_cast<char>(draw(0, 255));
    }
    for (const auto& each : data) spans.push_back({each.data(), static_cast<int64_t>(each.size())});
    uint64_t before = 0, after = 0;
    const auto run = [&](uint64_t* hash) {
        const cf_fingerprint_args a{spans.data(), count, whole, samples, hash};
        if (cf_cpu_fingerprint(&a) != CF_OK) printf("fingerprint: refused\n"), exit(1);
    };
    run(&before);
    for (auto& each : data)
        for (size_t k = 0; k < each.size(); ++k) {
            const int64_t size = static_cast<int64_t>(each.size()), words = size / 8,
                          word = static_cast<int64_t>(k) / 8;
            bool seen = size <= whole || words < samples || word >= words;
            for (int64_t i = 0; i < samples && !seen; ++i) seen = word == i * (words - 1) / (samples - 1);
            each[k] = static_cast<char>(each[k] ^ 0x40);
            run(&after);
            each[k] = static_cast<char>(each[k] ^ 0x40);
            if (seen == (before != after)) continue;
            printf("fingerprint: byte %d of %d is %s\n", static_cast<int>(k), static_cast<int>(size),
                   seen ? "not seen" : "seen");
            exit(1);
        }
    const cf_span none{nullptr, 1};
    for (const cf_fingerprint_args& wrong :
         {cf_fingerprint_args{&none, 1, 9, 2, &after}, cf_fingerprint_args{nullptr, 1, 9, 2, &after},
          cf_fingerprint_args{nullptr, 0, 9, 1, &after}, cf_fingerprint_args{nullptr, 0, 9, 2, nullptr}})
        if (cf_cpu_fingerprint(&wrong) != CF_INVALID_ARGUMENT) printf("fingerprint: taken\n"), exit(1);
}

// The hash of all bytes sees every change of one, and is the same from three threads.
void content_hashes(bool large) {
    std::vector<char> data(static_cast<size_t>(draw(0, large ? 3 << 20 : 200)));
    for (char& byte : data) byte = static_cast<char>(draw(0, 255));
    const auto hash = [&](int64_t threads) {
        uint64_t result = 0;
        const cf_content_hash_args a{data.data(), static_cast<int64_t>(data.size()), 5, &result, threads};
        if (cf_cpu_content_hash(&a) != CF_OK) printf("content_hash: refused\n"), exit(1);
        return result;
    };
    const uint64_t before = hash(1);
    if (hash(3) != before) printf("content_hash: three threads have another result than one\n"), exit(1);
    for (int i = 0; i < (large ? 3 : 40) && !data.empty(); ++i) {
        char& byte = data[static_cast<size_t>(draw(0, static_cast<int64_t>(data.size()) - 1))];
        const int bit = 1 << draw(0, 7);
        byte = static_cast<char>(byte ^ bit);
        if (hash(1) == before) printf("content_hash: a change is not seen\n"), exit(1);
        byte = static_cast<char>(byte ^ bit);
    }
    data.push_back(0);
    if (hash(1) == before) printf("content_hash: a zero more is not seen\n"), exit(1);
    uint64_t result = 0;
    for (const cf_content_hash_args& wrong :
         {cf_content_hash_args{nullptr, 1, 0, &result, 1}, cf_content_hash_args{&result, -1, 0, &result, 1},
          cf_content_hash_args{&result, 8, 0, nullptr, 1}})
        if (cf_cpu_content_hash(&wrong) != CF_INVALID_ARGUMENT) printf("content_hash: taken\n"), exit(1);
}

// The op as a step has the op's results.
void dual_head_step(Program& p, int64_t n, int64_t dtype) {
    auto call = std::make_shared<Call<cf_dual_head_args>>(
        dual_head(n, draw(1, 40), draw(1, 9), draw(1, 9), draw(1, 11), dtype));
    p.kept.push_back(call);
    cf_dual_head_args& a = p.add(CF_DUAL_HEAD, call->args);
    std::shared_ptr<Memory> results[2];
    for (size_t i = 0; i < 2; ++i)
        results[i] = p.memory(call->results[i].count() * sizes[call->results[i].dtype], true);
    a.direction.data = results[0]->bytes.data(), a.distance = reinterpret_cast<float*>(results[1]->bytes.data());
    p.checks.push_back([=] {
        cf_dual_head_args alone = call->args;
        std::vector<Buffer> expected = call->results;
        set_results(alone, expected);
        alone.threads = 1;
        bool right = cf_cpu_dual_head(&alone) == CF_OK;
        for (size_t i = 0; i < 2 && n; ++i)
            right = right && !memcmp(expected[i].data(), results[i]->bytes.data(), results[i]->bytes.size());
        if (right) return;
        printf("dual_head: another result as a step\n");
        exit(1);
    });
    p.refuse("dual_head's dtype", CF_DUAL_HEAD, a, [](cf_dual_head_args& w) { w.dtype = CF_UINT8; });
    p.refuse("dual_head's height", CF_DUAL_HEAD, a, [](cf_dual_head_args& w) { w.height = 0; });
}

// A step of random kind on x, if x has what it takes; else one that copies x into what others take.
Image any_step(Program& p, const Image& x) {
    const int64_t dtype = x.image.dtype, border = draw(0, 1), lanes = 4 / bytes_of(dtype);
    const bool products = multiplies(dtype) && x.channels % lanes == 0;
    if (products && x.image.border && draw(0, 2)) return convolution(p, x, 9, border);
    if (products && draw(0, 3) == 0) return convolution(p, x, 1, border);
    if (dtype != CF_UINT8 && x.dense()) {
        const int64_t kind = draw(0, 7);
        if (kind == 0) return layer_norm(p, x);
        if (kind == 7) return modulate(p, x);
        if (kind > 4) return pointwise(p, x);
        if (kind == 1 && x.channels % 2 == 0) return gate(p, x);
        const bool three = multiplies(dtype) && x.channels % (3 * lanes) == 0 && x.height * x.width < 50;
        if (kind == 2 && three) return attention(p, &x, x.n, dtype);
        return group_norm_image(p, x, border, draw(0, 1));
    }
    if (dtype != CF_UINT8 && x.height * x.width < 300)
        return gather(p, &x, x.n, draw(0, 2) ? (draw(0, 1) ? CF_FLOAT32 : CF_BFLOAT16) : CF_UINT8, border);
    return convolution(p, p.image(x.n, draw(1, 9), draw(1, 9), 4 * draw(1, 12), CF_FLOAT32, 1, draw(0, 1), false), 9,
                       border);
}

}  // namespace

#endif
