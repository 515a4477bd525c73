namespace MiniCpmNative.Kernels.Cases;

// The inputs of the cases.
public static partial class OpCases
{
    private static Value X(string name, params int[] shape) => Value.Float(
        name, shape, Fill.Normal(name.Sum(c => c) + shape.Length, new Shape(shape).Count));

    // Columns that are whole vectors of 16 bytes where the size is, so that what is off alignment
    // there must be noticed by its address.
    private static int Whole(int n, int otherwise) => n > 0 && n % 16 == 0 ? 16 : otherwise;

    // Of a size above 2,000 rows are as long as it is, and few.
    private static int Few(int n) => n > 2000 ? 3 : n;

    private static int Long(int n, int otherwise) => n > 2000 ? n : otherwise;

    private static Value[] Adapted(int rows, int outputs, int inputs, Value bias) =>
    [
        X("x", rows, inputs), X("w", outputs, inputs), bias, X("a", 4, inputs),
        X("bb", outputs, 4),
    ];

    private static Value[] Lora() => [X("x", Rows, Width), .. Lora(Width, "")];

    private static Value[] Dora() =>
        [.. Lora(), X("m", Width), Squares(X("n", Width, 1), 1)];

    // The squared norms of a matrix's rows, and something more: never near zero.
    private static Value Squares(Value matrix, double more) => Value.Float(
        matrix.Name == "n" ? "n" : "squares", [matrix.Shape[0]],
        Storage.Round([.. Enumerable.Range(0, matrix.Shape[0]).Select(r => more + matrix.Data
            .Skip(r * matrix.Shape[1]).Take(matrix.Shape[1]).Sum(v => v * v))], DType.BF16));

    // The last row is what scale a bb takes away twice, and less by its squares than nothing.
    private static Value[] Norm(int outputs, int inputs, int rank, double scale)
    {
        Value w = X("w", outputs, inputs), a = X("a", rank, inputs), bb = X("bb", outputs, rank);
        Value squares = Squares(w, 100);
        int last = outputs - 1;
        double[] taken = [.. Enumerable.Range(0, inputs).Select(c => -2 * scale
            * Enumerable.Range(0, rank).Sum(k =>
                bb.Data[(last * rank) + k] * a.Data[(k * inputs) + c]))];
        Storage.Round(taken, DType.BF16).CopyTo(w.Data, last * inputs);
        squares.Data[last] = 0;
        return [w, a, bb, squares];
    }

    private static Value[] Lora(int outputs, string number) =>
    [
        X("w" + number, outputs, Width), Value.Absent("b" + number), X("a" + number, 16, Width),
        X("bb" + number, outputs, 16),
    ];

    private static Value[] Turns(int tokens, int half) =>
    [
        Value.Int("positions", Fill.Below(2, tokens, 11)), X("cos", 11, half), X("sin", 11, half),
    ];

    private static Value[] Heads(int tokens, int queryCols, int keyCols, int[] lengths)
    {
        int[] starts = Starts(lengths);
        return
        [
            X("q", tokens, queryCols), X("k", tokens, keyCols), X("v", tokens, keyCols),
            Value.Int("cu_seqlens_q", starts), Value.Int("cu_seqlens_k", starts),
            Value.Absent("key_lengths"),
        ];
    }

    // Queries behind keys that are there before, in a cache with room for more.
    private static Value[] Cached(
        int queryCols, int keyCols, int[] queries, int[] before, int room)
    {
        int[] lengths = [.. queries.Zip(before, (q, b) => q + b)];
        int[] starts = Starts(queries), keyStarts = Starts([.. lengths.Select(k => k + room)]);
        return
        [
            X("q", starts[^1], queryCols), X("k", keyStarts[^1], keyCols),
            X("v", keyStarts[^1], keyCols), Value.Int("cu_seqlens_q", starts),
            Value.Int("cu_seqlens_k", keyStarts), Value.Int("key_lengths", lengths),
        ];
    }

    private static Value[] Delta(
        int[] lengths, int keyHeads, int valueHeads, int keyDim, int valueDim)
    {
        int tokens = lengths.Sum();
        return
        [
            X("qkv", tokens, (2 * keyHeads * keyDim) + (valueHeads * valueDim)),
            X("gates", tokens, 2 * valueHeads),
            // So little is forgotten that chunks hear of those before, as in trained models.
            Value.Float("a_log", [valueHeads],
                [.. Fill.Normal(6, valueHeads).Select(v => Math.Round(2 * v) / 4 - 4)]),
            X("dt_bias", valueHeads),
            Packed(lengths),
        ];
    }

    private static Value Packed(params int[] lengths) =>
        Value.Int("cu_seqlens", Starts(lengths));

    private static Value[] Cache(int room, int tokens, int cols) =>
    [
        X("cache", room, cols), X("x", tokens, cols),
        Value.Int("slots", Fill.Distinct(3, tokens, room, rising: true)),
    ];

    // Rows of 0 to most terms.
    private static Value[] Terms(int rows, int cols, int positions, int most)
    {
        int[] starts = Starts(Fill.Below(8, rows, most + 1));
        return
        [
            X("x", rows, cols), X("table", positions, cols), Value.Int("starts", starts),
            Value.Int("ids", Fill.Below(9, starts[^1], positions)), X("weights", starts[^1]),
        ];
    }

    // Nearly every row chooses the first expert, none the idle one.
    private static Value[] Mixture(
        int rows, int width, int experts, int idle, int inner, int chosen)
    {
        Value logits = X("logits", rows, experts);
        for (int i = 0; i < logits.Data.Length; i += experts)
        {
            logits.Data[i] += chosen;
            logits.Data[i + idle] -= 64;
        }

        return
        [
            X("x", rows, width), logits with { Data = Storage.Round(logits.Data, DType.BF16) },
            X("w", experts * 2 * inner, width), X("w1", experts * width, inner),
        ];
    }

    private static int[] Starts(int[] lengths) =>
        [0, .. lengths.Select((_, i) => lengths[..(i + 1)].Sum())];

    private static Value[] Head(int tokens, int cols, int labels, int vocabulary) =>
    [
        X("h", tokens, cols), X("w", vocabulary, cols),
        Value.Int("rows", Fill.Distinct(3, labels, tokens, rising: true)),
        Value.Int("targets", Fill.Below(4, labels, vocabulary)),
    ];

    // Every logit is there twice, so that the largest are equal. Two labels of three are one of
    // these, the first or the second; where the second label stands no logit is above zero.
    private static Value[] Chosen(Value[] head, double scale = 1)
    {
        Value h = head[0], rows = head[2], targets = head[3];
        int vocabulary = head[1].Shape[0], half = vocabulary / 2;
        for (int i = 1; i < head.Length; i += 4)
            Array.Copy(head[i].Data, 0, head[i].Data, half * head[i].Shape[1],
                half * head[i].Shape[1]);
        for (int v = 0; v < vocabulary; v++)
            head[1].Data[v * h.Shape[1]] = Math.Abs(head[1].Data[v * h.Shape[1]]);
        for (int label = 0; label < rows.Data.Length; label++)
        {
            int row = (int)rows.Data[label];
            if (label == 1)
                for (int i = 0; i < head.Length; i += 4)
                    for (int c = 0; c < head[i].Shape[1]; c++)
                        head[i].Data[(row * head[i].Shape[1]) + c] = i + c == 0 ? -4 : 0;
            if (label % 3 == 2) continue;
            double[] logits = [.. Enumerable.Range(0, vocabulary).Select(v => Product(head, row, v)
                + (head.Length > 4 ? scale * Product(head[4..], row, v) : 0))];
            int first = Array.IndexOf(logits, logits.Max());
            targets.Data[label] = label % 3 == 0 ? first : Array.LastIndexOf(logits, logits[first]);
        }

        return head;
    }

    private static double Product(Value[] x, int row, int of) =>
        Enumerable.Range(0, x[0].Shape[1]).Sum(c =>
            x[0].Data[(row * x[0].Shape[1]) + c] * x[1].Data[(of * x[0].Shape[1]) + c]);
}
