// The elementwise half of the angular dispersion loss on CPUs: one pass over a block of inner products turns them into
// the weights of the gradient and sums what the loss needs. angular_kernel.py compiles and calls it; the matrix
// products before and after are PyTorch's.
//
// For unit vectors with cosine c, D = arccos(clamp(c)) / pi and e = exp(-D / tau) it computes, for every pair but a
// vector with itself, e and w = de/dc = e / (pi tau sqrt(1 - c^2)): value and slope share the square root, and arccos
// and exp are polynomials that a compiler turns into vector instructions. Polynomials: least squares at Chebyshev nodes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 64;  // rows and columns of a job; its floats stay in the first cache

// arccos(x) / sqrt(1 - x) for x in [0, 1]; relative error 1.6e-8 before rounding.
inline float arccos_over_root(float x) {
    float p = -1.23700485e-3f;
    p = p * x + 6.58088524e-3f;
    p = p * x - 1.69654720e-2f;
    p = p * x + 3.08082534e-2f;
    p = p * x - 5.01450250e-2f;
    p = p * x + 8.89740993e-2f;
    p = p * x - 2.14598494e-1f;
    return p * x + 1.57079630f;
}

// 2^y for y <= 0: the integer part goes into the exponent's bits, the rest is a polynomial with error 2.6e-9.
inline float exp2_of_negative(float y) {
    y = y < -126.0f ? -126.0f : y;
    const float whole = __builtin_rintf(y), part = y - whole;
    float p = 1.54697320e-4f;
    p = p * part + 1.34004322e-3f;
    p = p * part + 9.61802560e-3f;
    p = p * part + 5.55032721e-2f;
    p = p * part + 2.40226512e-1f;
    p = p * part + 6.93147207e-1f;
    p = p * part + 1.0f;
    const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// Sum of a tile's row in one fixed order, so that a row has the same sum whether its pairs were computed or mirrored.
inline float sum_of(const float* values) {
    float lanes[16] = {};
    for (int64_t first = 0; first < TILE; first += 16)
        for (int64_t i = 0; i < 16; ++i) lanes[i] += values[first + i];
    for (int64_t half = 8; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

struct Sums {
    double similarity = 0.0, clamped = 0.0, cosine = 0.0;
};

}  // namespace

// gram: (sets, rows, columns), contiguous: inner products z_i . z_j. Where `symmetric`, the columns begin with the rows
//     themselves and tiles left of the diagonal are not read.
// weights: w_ij r_i r_j, by strides; where a row meets itself -along_i dots_i, what is on hand of dots then being whole.
//     May be gram itself. Where `symmetric` they are also written below the diagonal: as far as there are rows, or for all
//     columns if `mirror_all`.
// row_scale, column_scale: r by set stride, so that r_i z_i is a unit vector. along: r / |z| of the rows, as row_scale.
// diagonal: the column in which row 0 meets itself.
// edge: cosines are clamped to [-edge, edge], straight-through. rate: -1 / (pi tau).
// sums: (sets, 3), sum of e, number of clamped pairs, sum of c. dots: by set stride, sum over j of w_ij c_ij for each row, and
//     where `symmetric` for each column too. Both are added to.
extern "C" void angular_sweep(
    const float* gram, int64_t sets, int64_t rows, int64_t columns, float* weights, int64_t weights_set_stride,
    int64_t weights_row_stride, const float* row_scale, const float* along, int64_t row_scale_stride,
    const float* column_scale, int64_t column_scale_stride, int64_t diagonal, int32_t symmetric, int32_t mirror_all, float edge, float rate,
    double* sums, float* dots, int64_t dots_stride, int32_t threads) {
    const int64_t row_tiles = (rows + TILE - 1) / TILE, column_tiles = (columns + TILE - 1) / TILE;
    const int64_t tiles = row_tiles * column_tiles;
    const float rate_of_two = rate * 1.44269504f;
    // Every tile leaves its sums in a place of its own, so that results do not depend on the number of threads.
    std::vector<Sums> tile_sums(sets * tiles);
    std::vector<float> dots_of_rows(sets * tiles * TILE), dots_of_columns(symmetric ? sets * tiles * TILE : 0);

#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t job = 0; job < sets * tiles; ++job) {
        const int64_t set = job / tiles, row_tile = job % tiles / column_tiles, column_tile = job % column_tiles;
        const bool is_mirrored = symmetric && column_tile > row_tile;
        if (symmetric && column_tile < row_tile) continue;
        const int64_t first_row = row_tile * TILE, last_row = std::min(first_row + TILE, rows);
        const int64_t first_column = column_tile * TILE, width = std::min(TILE, columns - first_column);
        const float* const scale_of_columns = column_scale + set * column_scale_stride + first_column;
        float tile[TILE][TILE], dots_of_tile[TILE][TILE] = {};
        Sums total;
        for (int64_t row = first_row; row < last_row; ++row) {
            const float* const products = gram + (set * rows + row) * columns + first_column;
            float* const weight = tile[row - first_row];
            float* const dot = dots_of_tile[row - first_row];
            const float own_scale = row_scale[set * row_scale_stride + row];
            const int32_t self = static_cast<int32_t>(std::clamp<int64_t>(diagonal + row - first_column, -1, TILE));
            float similarity = 0.0f, cosines = 0.0f;
            int32_t clamped = 0;
#pragma omp simd reduction(+ : similarity, cosines, clamped)
            for (int32_t j = 0; j < static_cast<int32_t>(width); ++j) {
                const float scales = own_scale * scale_of_columns[j];  // first: the cosine is symmetric to the last bit
                const float cosine = products[j] * scales;
                const float size = __builtin_fabsf(cosine);
                const float x = size > edge ? edge : size;  // a NaN is no larger than the edge: it stays
                const float root = __builtin_sqrtf(1.0f - x);
                const float acute = arccos_over_root(x) * root;
                const float angle = cosine < 0.0f ? 3.14159265f - acute : acute;
                const float is_other = j == self ? 0.0f : 1.0f;
                const float e = j == self ? 0.0f : exp2_of_negative(angle * rate_of_two);
                const float slope = -rate * e / (root * __builtin_sqrtf(1.0f + x));
                similarity += e;
                dot[j] = slope * cosine;
                clamped += size * is_other > edge ? 1 : 0;
                cosines += cosine * is_other;
                weight[j] = slope * scales;
            }
            dots_of_rows[job * TILE + row - first_row] = sum_of(dot);
            total.similarity += similarity;
            total.clamped += clamped;
            total.cosine += cosines;
            float* const target = weights + set * weights_set_stride + row * weights_row_stride + first_column;
            std::memcpy(target, weight, width * sizeof(float));
        }
        if (is_mirrored) {
            total.similarity *= 2.0;
            total.clamped *= 2.0;
            total.cosine *= 2.0;
            for (int64_t j = 0; j < width; ++j) {
                float column[TILE];
                for (int64_t i = 0; i < TILE; ++i) column[i] = dots_of_tile[i][j];
                dots_of_columns[job * TILE + j] = sum_of(column);
            }
            const int64_t mirrored_rows = mirror_all ? columns : rows;
            for (int64_t j = 0; j < width && first_column + j < mirrored_rows; ++j) {
                float* const target =
                    weights + set * weights_set_stride + (first_column + j) * weights_row_stride + first_row;
                for (int64_t i = 0; i < last_row - first_row; ++i) target[i] = tile[i][j];
            }
        }
        tile_sums[job] = total;
    }

    for (int64_t job = 0; job < sets * tiles; ++job) {
        const int64_t set = job / tiles, row_tile = job % tiles / column_tiles, column_tile = job % column_tiles;
        if (symmetric && column_tile < row_tile) continue;
        sums[3 * set] += tile_sums[job].similarity;
        sums[3 * set + 1] += tile_sums[job].clamped;
        sums[3 * set + 2] += tile_sums[job].cosine;
        float* const dots_of_set = dots + set * dots_stride;
        for (int64_t row = row_tile * TILE, i = 0; i < TILE && row + i < rows; ++i)
            dots_of_set[row + i] += dots_of_rows[job * TILE + i];
        if (!symmetric || column_tile == row_tile) continue;
        for (int64_t column = column_tile * TILE, j = 0; j < TILE && column + j < columns; ++j)
            dots_of_set[column + j] += dots_of_columns[job * TILE + j];
    }
    for (int64_t set = 0; set < sets; ++set)
        for (int64_t row = 0; row < rows; ++row)
            weights[set * weights_set_stride + row * weights_row_stride + diagonal + row] =
                -dots[set * dots_stride + row] * along[set * row_scale_stride + row];
}
