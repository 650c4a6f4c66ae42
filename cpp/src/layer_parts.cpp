#include "layer_parts.hpp"

#include "codes.hpp"

namespace globe::detail {
namespace {

constexpr std::int64_t bytes_a_block = 32 << 10;

}  // namespace

const std::vector<Term> itself = {{0, 1.0F}};

Rows stored_rows(const FamilyView& family, std::int64_t expert) {
    const ConstMatrixView& first = family.matrices;
    const auto* base = family.each != nullptr ? static_cast<const unsigned char*>(family.each[expert])
                                              : static_cast<const unsigned char*>(first.data) +
                                                    expert * family.step * entry_of(first.dtype);
    return {base, row_bytes(first), first.rows, first.cols, first.dtype, &itself};
}

Rows mixture_rows(const FamilyView& family, std::int64_t expert, std::int64_t width, DType dtype,
                  std::vector<Term>& terms) {
    const std::int64_t rank = family.matrices.cols;
    if (family.mixtures != nullptr && family.mixtures[expert] != nullptr) {
        return {static_cast<const unsigned char*>(family.mixtures[expert]),
                width * entry_of(dtype),
                rank,
                width,
                dtype,
                &itself};
    }
    const ConstMatrixView& atoms = family.atoms;
    const std::int64_t row = family.first_row + family.row_step * expert;
    check_codes(family.codes, atoms, row, row + 1);
    terms.clear();
    for (std::int64_t k = family.codes.indptr[row]; k < family.codes.indptr[row + 1]; ++k)
        terms.push_back({family.codes.indices[k] * row_bytes(atoms), family.codes.values[k]});
    return {static_cast<const unsigned char*>(atoms.data),
            width * entry_of(atoms.dtype),
            rank,
            width,
            atoms.dtype,
            &terms};
}

std::vector<Used> used_experts(const Routing& routing, std::int64_t tokens, std::int64_t experts) {
    std::vector<Used> found;
    std::vector<std::int64_t> places(place(experts), -1);
    for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t k = t * routing.count; k < (t + 1) * routing.count; ++k) {
            const std::int64_t expert = routing.experts[k];
            if (expert >= experts) continue;
            std::int64_t& where = places[place(expert)];
            if (where < 0) {
                where = static_cast<std::int64_t>(found.size());
                found.push_back({expert, {}, {}});
            }
            Used& used = found[place(where)];
            if (!used.tokens.empty() && used.tokens.back() == t) {
                used.weights.back() += routing.weights[k];
                continue;
            }
            used.tokens.push_back(t);
            used.weights.push_back(routing.weights[k]);
        }
    }
    std::sort(found.begin(), found.end(), [](const Used& a, const Used& b) { return a.expert < b.expert; });
    return found;
}

std::vector<Block> column_blocks(std::int64_t columns, std::size_t number) {
    std::vector<Block> blocks;
    for (std::int64_t first = 0; first < columns; first += columns_a_block)
        blocks.push_back({number, first, std::min(columns_a_block, columns - first)});
    return blocks;
}

void add_row_blocks(std::vector<Block>& blocks, std::size_t number, std::int64_t rows, std::int64_t bytes,
                    std::int64_t least) {
    const std::int64_t height =
        std::max<std::int64_t>(least, bytes_a_block / std::max<std::int64_t>(1, bytes));
    for (std::int64_t first = 0; first < rows; first += height)
        blocks.push_back({number, first, std::min(height, rows - first)});
}

void add_up(DType from, const unsigned char* base, const std::vector<Term>& terms, DType to, void* out,
            std::int64_t width) {
    const std::int64_t starts[] = {0, static_cast<std::int64_t>(terms.size())};
    Ahead nothing{};
    variant().compose[index_of(from)][index_of(to)]({base, terms.data(), starts, 1, width},
                                                    static_cast<unsigned char*>(out), 0, false, nothing);
}

void multiply_row(const Rows& rows, std::int64_t i, const Numbers& x, std::int64_t first, std::int64_t tokens,
                  float* products) {
    variant().compose_matmul.multiply_row[index_of(rows.dtype)](
        {rows.base + i * rows.pitch, rows.terms->data(), rows.size(), rows.width}, x.of(first), x.width,
        tokens, products);
}

Rows in_dtype(const Rows& rows, std::int64_t first, std::int64_t count, DType dtype) {
    const unsigned char* base = rows.base + first * rows.pitch;
    if (rows.stored() && rows.dtype == dtype) return {base, rows.pitch, count, rows.width, dtype, &itself};
    const std::int64_t pitch = rows.width * entry_of(dtype);
    thread_local std::vector<unsigned char> made;
    made.resize(place(count * pitch));
    for (std::int64_t i = 0; i < count; ++i)
        add_up(rows.dtype, base + i * rows.pitch, *rows.terms, dtype, made.data() + i * pitch, rows.width);
    return {made.data(), pitch, count, rows.width, dtype, &itself};
}

std::vector<Numbers> multiply(const std::vector<Used>& used, const std::vector<Rows>& rows,
                              const std::vector<Numbers>& x, const Manner& manner) {
    std::vector<Numbers> results(used.size());
    std::vector<Block> blocks;
    std::int64_t bytes = 0;
    for (std::size_t e = 0; e < used.size(); ++e) {
        results[e].resize(used[e].size(), rows[e].count);
        add_row_blocks(blocks, e, rows[e].count, rows[e].bytes_a_row());
        bytes += rows[e].count * rows[e].bytes_a_row() * used[e].rounds();
    }
    each(blocks, bytes, manner.threads, [&](const Block& block) {
        const std::size_t e = block.number;
        const Rows some = in_dtype(rows[e], block.first, block.count, manner.dtype);
        float products[few_tokens];
        for (std::int64_t first = 0; first < used[e].size(); first += few_tokens) {
            const std::int64_t tokens = std::min(few_tokens, used[e].size() - first);
            for (std::int64_t i = 0; i < block.count; ++i) {
                multiply_row(some, i, x[e], first, tokens, products);
                for (std::int64_t t = 0; t < tokens; ++t)
                    results[e].of(first + t)[block.first + i] = products[t];
            }
        }
    });
    return results;
}

std::vector<Numbers> arranged_tokens(const std::vector<Used>& used, const ConstMatrixView& tokens,
                                     DType dtype) {
    const auto arrange = variant().compose_matmul.arrange[index_of(dtype)][index_of(tokens.dtype)];
    std::vector<Numbers> found(used.size());
    for (std::size_t e = 0; e < used.size(); ++e) {
        found[e].resize(used[e].size(), tokens.cols);
        for (std::int64_t t = 0; t < used[e].size(); ++t) {
            const auto* token =
                static_cast<const unsigned char*>(tokens.data) + used[e].tokens[place(t)] * row_bytes(tokens);
            arrange(token, tokens.cols, found[e].of(t));
        }
    }
    return found;
}

std::vector<Numbers> arranged(const std::vector<Used>& used, const std::vector<Numbers>& numbers,
                              DType dtype) {
    const auto arrange = variant().compose_matmul.arrange[index_of(dtype)][index_of(DType::float32)];
    std::vector<Numbers> found(used.size());
    for (std::size_t e = 0; e < used.size(); ++e) {
        found[e].resize(used[e].size(), numbers[e].width);
        for (std::int64_t t = 0; t < used[e].size(); ++t)
            arrange(numbers[e].of(t), numbers[e].width, found[e].of(t));
    }
    return found;
}

}  // namespace globe::detail
