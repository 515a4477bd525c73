using System.Numerics;
using System.Numerics.Tensors;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// <see cref="Experts"/> on the CPU: one expert after the other, its rows gathered, multiplied on
/// all threads and added to where they came from. So a row's sum has the order of the experts'
/// numbers, whatever the number of threads, and scratch is that of the busiest expert's rows.
/// </summary>
internal static unsafe class CpuExperts
{
    public static void Forward<T>(in CpuCall<T> call, int chosen)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> x = call.In(0), logits = call.In(1), y = call.Output, g = call.Saved(1);
        var routing = new Routing(logits.Cols, x.Rows, chosen);
        int* ints = call.SavedInts(0).Data;
        call.Workers.For(x.Rows, new Choose<T>(logits, chosen, ints + routing.ExpertOf, g.Data));
        int most = Sort(routing, ints);
        var weights = new Weights<T>(call, routing);
        Matrix<T> part = call.Scratch(new Shape(most, x.Cols));
        Matrix<T> inner = call.Scratch(new Shape(most, weights.Inner));
        new Span<T>(y.Data, checked((int)y.Count)).Clear();
        for (int e = 0; e < routing.Experts; e++)
        {
            int first = ints[e], rows = ints[e + 1] - first;
            if (rows == 0) continue;
            int* terms = ints + routing.TermAt + first;
            Matrix<T> own = part.Slice(0, rows), a = inner.Slice(0, rows);
            var (gate, up) = GateAndUp(call, routing, first, rows);
            call.Workers.For(rows, new Gather<T>(x, terms, chosen, own));
            call.Gemm.Multiply(own.View, weights.Gate(e).T, gate.View);
            call.Gemm.Multiply(own.View, weights.Up(e).T, up.View);
            Elementwise.Map(
                call.Workers, gate, up, default, a, false, default(SwiGlu.Value<T>));
            call.Gemm.Multiply(a.View, weights.Down(e).T, own.View);
            call.Workers.For(rows, new AddTo<T>(own, terms, chosen, g.Data, y));
        }
    }

    // With z = W1^T dy of a term:  dg = z . a;  da = g z;  dW1 = dy (g a)^T.
    public static void Backward<T>(in CpuCall<T> call, int chosen)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> x = call.In(0), dy = call.OutputGradient, g = call.Saved(1);
        Gradient<T> dx = call.Gradient(0), dw = call.Gradient(2), dw1 = call.Gradient(3);
        var routing = new Routing(call.Input(1).Shape.Cols, dy.Rows, chosen);
        int* ints = call.SavedInts(0).Data;
        int most = 0;
        for (int e = 0; e < routing.Experts; e++) most = Math.Max(most, ints[e + 1] - ints[e]);
        var weights = new Weights<T>(call, routing);
        int width = dy.Cols, wide = weights.Inner;
        Matrix<T> part = call.Scratch(new Shape(most, width));
        Matrix<T> value = call.Scratch(new Shape(most, wide)),
            slope = call.Scratch(new Shape(most, wide)),
            dGate = call.Scratch(new Shape(most, wide)), dUp = call.Scratch(new Shape(most, wide)),
            dg = call.Scratch(new Shape(routing.Terms));
        if (dx is { Wanted: true, Accumulate: false })
            new Span<T>(dx.Into.Data, checked((int)dx.Into.Count)).Clear();
        for (int e = 0; e < routing.Experts; e++)
        {
            int first = ints[e], rows = ints[e + 1] - first;
            Gradient<T> ofGate = Rows(dw, 2 * e * wide, wide),
                ofUp = Rows(dw, ((2 * e) + 1) * wide, wide), ofDown = Rows(dw1, e * width, width);
            if (rows == 0)
            {
                Clear(ofGate);
                Clear(ofUp);
                Clear(ofDown);
                continue;
            }

            int* terms = ints + routing.TermAt + first;
            Matrix<T> own = part.Slice(0, rows), a = value.Slice(0, rows),
                da = slope.Slice(0, rows);
            var (gate, up) = GateAndUp(call, routing, first, rows);
            call.Workers.For(rows, new Gather<T>(dy, terms, chosen, own));
            call.Gemm.Multiply(own.View, weights.Down(e), da.View);
            Elementwise.Map(
                call.Workers, gate, up, default, a, false, default(SwiGlu.Value<T>));
            call.Workers.For(rows, new Weigh<T>(a, da, terms, g.Data, dg.Data));
            call.Multiply(own.View.T, a.View, ofDown);
            if (!dx.Wanted && !dw.Wanted) continue;
            Matrix<T> g0 = dGate.Slice(0, rows), g1 = dUp.Slice(0, rows);
            Elementwise.Map(call.Workers, gate, up, da, g0, false, default(SwiGlu.GateSlope<T>));
            Elementwise.Map(call.Workers, gate, da, default, g1, false, default(SwiGlu.Value<T>));
            if (dw.Wanted)
            {
                call.Workers.For(rows, new Gather<T>(x, terms, chosen, own));
                call.Multiply(g0.View.T, own.View, ofGate);
                call.Multiply(g1.View.T, own.View, ofUp);
            }

            if (!dx.Wanted) continue;
            call.Gemm.Multiply(g0.View, weights.Gate(e), own.View);
            call.Gemm.Multiply(g1.View, weights.Up(e), own.View, beta: 1);
            call.Workers.For(rows, new AddTo<T>(own, terms, chosen, null, dx.Into));
        }

        if (call.Gradient(1) is { Wanted: true } dLogits)
            call.Workers.For(dy.Rows, new LogitRows<T>(
                ints + routing.ExpertOf, g.Data, dg.Data, chosen, dLogits));
    }

    private static (Matrix<T> Gate, Matrix<T> Up) GateAndUp<T>(
        in CpuCall<T> call, Routing routing, int first, int rows)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> => (
            call.Saved(2).Slice(first, rows), call.Saved(2).Slice(routing.Terms + first, rows));

    private static Gradient<T> Rows<T>(Gradient<T> all, int first, int count)
        where T : unmanaged, IBinaryFloatingPointIeee754<T> =>
        all.Wanted ? new(all.Into.Slice(first, count), all.Accumulate) : default;

    // No row has come this way.
    private static void Clear<T>(Gradient<T> gradient)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        if (gradient is { Wanted: true, Accumulate: false })
            new Span<T>(gradient.Into.Data, checked((int)gradient.Into.Count)).Clear();
    }

    // Begins, terms and places from the experts of the terms; returns the terms of the busiest.
    private static int Sort(Routing routing, int* ints)
    {
        int* expert = ints + routing.ExpertOf, term = ints + routing.TermAt,
            place = ints + routing.PlaceOf;
        int experts = routing.Experts, terms = routing.Terms, most = 0;
        new Span<int>(ints, experts + 1).Clear();
        for (int i = 0; i < terms; i++) ints[expert[i] + 1]++;
        for (int e = 0; e < experts; e++)
        {
            most = Math.Max(most, ints[e + 1]);
            ints[e + 1] += ints[e];
        }

        for (int i = 0; i < terms; i++)
        {
            place[i] = ints[expert[i]]++;
            term[place[i]] = i;
        }

        // Each begin has become the next one's.
        for (int e = experts; e > 0; e--) ints[e] = ints[e - 1];
        ints[0] = 0;
        return most;
    }

    /// <summary>The matrices of each expert.</summary>
    private readonly ref struct Weights<T>(CpuCall<T> call, Routing routing)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        private readonly MatrixView _w = call.View(2), _w1 = call.View(3);

        public int Inner => _w1.Cols;

        public MatrixView Gate(int e) => _w.RowRange(2 * e * Inner, Inner);

        public MatrixView Up(int e) => _w.RowRange(((2 * e) + 1) * Inner, Inner);

        public MatrixView Down(int e) => _w1.RowRange(e * (_w1.Rows / routing.Experts), _w.Cols);
    }

    // The experts of each row from the largest logit on, and the softmax of theirs.
    private readonly struct Choose<T>(Matrix<T> logits, int chosen, int* experts, T* g)
        : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                T* z = logits.Row(r);
                T sum = T.Zero;
                for (int k = 0; k < chosen; k++)
                {
                    int term = (r * chosen) + k, best = -1;
                    for (int e = 0; e < logits.Cols; e++)
                        if ((k == 0 || IsBefore(z, experts[term - 1], e))
                            && (best < 0 || IsBefore(z, e, best))) best = e;
                    experts[term] = best;
                    sum += g[term] = T.Exp(z[best] - z[experts[r * chosen]]);
                }

                for (int k = 0; k < chosen; k++) g[(r * chosen) + k] /= sum;
            }
        }

        // Whether expert a counts as larger than b: NaN as the largest, so that it is seen.
        private static bool IsBefore(T* z, int a, int b) =>
            T.IsNaN(z[a]) != T.IsNaN(z[b]) ? T.IsNaN(z[a])
            : z[a] > z[b] || (!(z[b] > z[a]) && a < b);
    }

    // to[i] = the row that term i is of.
    private readonly struct Gather<T>(Matrix<T> from, int* terms, int chosen, Matrix<T> to)
        : IRangeBody
        where T : unmanaged
    {
        public void Run(int begin, int end, int worker)
        {
            for (int i = begin; i < end; i++)
                from.RowSpan(terms[i] / chosen).CopyTo(to.RowSpan(i));
        }
    }

    // The reverse, each row times its weight where there are weights. A row is there once at most.
    private readonly struct AddTo<T>(
        Matrix<T> from, int* terms, int chosen, T* weights, Matrix<T> to) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int i = begin; i < end; i++)
                Elementwise.Map(from.Row(i), null, null, to.Row(terms[i] / chosen), to.Cols, true,
                    new Elementwise.Scaled<T>(weights is null ? T.One : weights[terms[i]]));
        }
    }

    // dg = a . z, and both times the weight g.
    private readonly struct Weigh<T>(Matrix<T> a, Matrix<T> z, int* terms, T* g, T* dg)
        : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int i = begin; i < end; i++)
            {
                T weight = g[terms[i]];
                dg[terms[i]] = TensorPrimitives.Dot<T>(a.RowSpan(i), z.RowSpan(i));
                TensorPrimitives.Multiply(a.RowSpan(i), weight, a.RowSpan(i));
                TensorPrimitives.Multiply(z.RowSpan(i), weight, z.RowSpan(i));
            }
        }
    }

    // dz[e] = g[e] (dg[e] - sum of g dg) of the chosen, 0 of all others.
    private readonly struct LogitRows<T>(
        int* experts, T* g, T* dg, int chosen, Gradient<T> dLogits) : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public void Run(int begin, int end, int worker)
        {
            for (int r = begin; r < end; r++)
            {
                int first = r * chosen;
                T* into = dLogits.Into.Row(r);
                T mean = T.Zero;
                for (int i = first; i < first + chosen; i++) mean += g[i] * dg[i];
                if (!dLogits.Accumulate) dLogits.Into.RowSpan(r).Clear();
                for (int i = first; i < first + chosen; i++)
                    into[experts[i]] += g[i] * (dg[i] - mean);
            }
        }
    }
}
