using System.Numerics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>The operands of the delta rule; see the operation.</summary>
internal readonly struct DeltaHeads<T>
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    public int KeyHeads { get; init; }

    public int ValueHeads { get; init; }

    public int KeyDim { get; init; }

    public int ValueDim { get; init; }

    public Matrix<T> Qkv { get; init; }

    /// <summary>b and a side by side.</summary>
    public Matrix<T> Gates { get; init; }

    public Matrix<T> ALog { get; init; }

    public Matrix<T> DtBias { get; init; }

    public Matrix<int> Starts { get; init; }

    public Matrix<T> State { get; init; }

    /// <summary>Value heads of a key head.</summary>
    public int Group => ValueHeads / KeyHeads;

    /// <summary>Columns of qkv.</summary>
    public int KeyColumn(int head) => (KeyHeads + head) * KeyDim;

    /// <inheritdoc cref="KeyColumn"/>
    public int ValueColumn(int head) => (2 * KeyHeads * KeyDim) + (head * ValueDim);
}

/// <summary>
/// The delta rule over up to 64 tokens of a value head at once. With b_i the sum of g up to token i
/// of the chunk, G_ij = e^(b_i - b_j) for j up to i and else 0, and S the state at its start:
///
///   L = strictly lower part of beta_i (k_i k_j) G_ij        (I + L) X = beta (v - e^b k S)
///   O = e^b q S + P X,  P_ij = (q_i k_j) G_ij               S' = e^b_last S + k^T e^(b_last - b) X
///
/// Rows and columns that pad a chunk are zero. Memory of one thread, all of it in its cache.
/// </summary>
internal unsafe struct DeltaChunk<TLanes, TVector, T>
    where TLanes : struct, ILanes<TVector, T>
    where TVector : struct
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    public const int Tokens = 64;

    private static readonly T s_epsilon = Real.Of<T>(1e-6);

    /// <summary>Columns of keys and of values, padded.</summary>
    public int KeyCols, ValueCols;

    /// <summary>Tokens of the chunk, and the same padded.</summary>
    public int Count, Rows;

    /// <summary>q, k [64, KeyCols]; k transposed [KeyCols, 64]; v, X [64, ValueCols].</summary>
    public T* Q, K, KeysAcross, V, X;

    /// <summary>k k^T, q k^T, G, L and P [64, 64]; k S [64, ValueCols].</summary>
    public T* KeyProducts, QueryProducts, Decays, Lower, Scores, Read;

    /// <summary>Per token: 1 / |q|, 1 / |k|, beta, g, b, e^b and e^(b_last - b).</summary>
    public T* QueryScale, KeyScale, Beta, Gate, Sum, Decay, Rest;

    public DeltaChunk(T* memory, int keyCols, int valueCols)
    {
        (KeyCols, ValueCols, Count, Rows) = (keyCols, valueCols, 0, 0);
        Q = Take(ref memory, Tokens * keyCols);
        K = Take(ref memory, Tokens * keyCols);
        KeysAcross = Take(ref memory, Tokens * keyCols);
        V = Take(ref memory, Tokens * valueCols);
        X = Take(ref memory, Tokens * valueCols);
        Read = Take(ref memory, Tokens * valueCols);
        KeyProducts = Take(ref memory, Tokens * Tokens);
        QueryProducts = Take(ref memory, Tokens * Tokens);
        Decays = Take(ref memory, Tokens * Tokens);
        Lower = Take(ref memory, Tokens * Tokens);
        Scores = Take(ref memory, Tokens * Tokens);
        QueryScale = Take(ref memory, Tokens);
        KeyScale = Take(ref memory, Tokens);
        Beta = Take(ref memory, Tokens);
        Gate = Take(ref memory, Tokens);
        Sum = Take(ref memory, Tokens);
        Decay = Take(ref memory, Tokens);
        Rest = Take(ref memory, Tokens);
    }

    /// <summary>Elements of its memory.</summary>
    public static int Elements(int keyCols, int valueCols) =>
        (Tokens * 3 * (keyCols + valueCols)) + (5 * Tokens * Tokens) + (7 * Tokens);

    public static T* Take(ref T* memory, int count)
    {
        T* taken = memory;
        memory += count;
        return taken;
    }

    public static int Padded(int cols)
    {
        int tile = SmallProduct<TLanes, TVector, T>.Cols;
        return (cols + tile - 1) / tile * tile;
    }

    /// <summary>q and k of the tokens from first on, of length 1.</summary>
    public void LoadKeys(in DeltaHeads<T> heads, int keyHead, int first, int count)
    {
        (Count, Rows) = (count, (count + 3) / 4 * 4);
        T scale = T.One / T.Sqrt(Real.Of<T>(heads.KeyDim));
        new Span<T>(KeysAcross, KeyCols * Tokens).Clear();
        for (int i = 0; i < Rows; i++)
        {
            T* row = i < count ? heads.Qkv.Row(first + i) : null;
            int dim = heads.KeyDim;
            QueryScale[i] = Unit(row + (keyHead * dim), Q + (i * KeyCols), dim, row, scale);
            KeyScale[i] = Unit(row + heads.KeyColumn(keyHead), K + (i * KeyCols), dim, row, T.One);
            for (int c = 0; c < dim; c++) KeysAcross[(c * Tokens) + i] = K[(i * KeyCols) + c];
        }

        Across(K, KeyProducts);
        Across(Q, QueryProducts);
    }

    /// <summary>v and gates of a value head, G, L and P.</summary>
    public void LoadValues(in DeltaHeads<T> heads, int head, int first)
    {
        T strength = T.Exp(heads.ALog[head]), bias = heads.DtBias[head], sum = T.Zero;
        for (int i = 0; i < Rows; i++)
        {
            T* to = V + (i * ValueCols);
            new Span<T>(to, ValueCols).Clear();
            (Beta[i], Gate[i]) = (T.Zero, T.Zero);
            if (i < Count)
            {
                new Span<T>(heads.Qkv.Row(first + i) + heads.ValueColumn(head), heads.ValueDim)
                    .CopyTo(new Span<T>(to, heads.ValueDim));
                T* gates = heads.Gates.Row(first + i);
                Beta[i] = VectorMath.Sigmoid(gates[head]);
                Gate[i] = -strength * SoftPlus(gates[heads.ValueHeads + head] + bias);
            }

            sum += Gate[i];
            Sum[i] = sum;
            Decay[i] = T.Exp(sum);
        }

        for (int i = 0; i < Rows; i++)
        {
            Rest[i] = i < Count ? T.Exp(sum - Sum[i]) : T.Zero;
            int row = i * Tokens;
            for (int j = 0; j <= i; j += Vector<T>.Count)
                Vector.Store(
                    VectorMath.Exp(Vector.Create(Sum[i]) - Vector.Load(Sum + j)), Decays + row + j);
            // The last of them is 1, but not where a sum is not a number.
            for (int j = 0; j <= i; j++)
            {
                Lower[row + j] = j < i ? Beta[i] * Decays[row + j] * KeyProducts[row + j] : T.Zero;
                Scores[row + j] = Decays[row + j] * QueryProducts[row + j];
            }

            new Span<T>(Lower + row + i + 1, Tokens - i - 1).Clear();
            new Span<T>(Scores + row + i + 1, Tokens - i - 1).Clear();
        }
    }

    /// <summary>k S and X.</summary>
    public void Solve(T* state)
    {
        SmallProduct<TLanes, TVector, T>.Run(K, KeyCols, 1, state, ValueCols, Read, ValueCols,
            Rows, ValueCols, KeyCols, add: false);
        int width = TLanes.Count;
        for (int i = 0; i < Rows; i++)
        {
            T* x = X + (i * ValueCols), v = V + (i * ValueCols), read = Read + (i * ValueCols);
            TVector beta = TLanes.Broadcast(Beta[i]), decay = TLanes.Broadcast(-Decay[i]);
            for (int c = 0; c < ValueCols; c += width)
                TLanes.Store(x + c, TLanes.Multiply(
                    beta, TLanes.Fma(decay, TLanes.Load(read + c), TLanes.Load(v + c))));
            for (int j = 0; j < i; j++)
                Subtract(x, X + (j * ValueCols), Lower[(i * Tokens) + j], ValueCols);
        }
    }

    /// <summary>x -= factor * y.</summary>
    public static void Subtract(T* x, T* y, T factor, int count)
    {
        TVector scale = TLanes.Broadcast(-factor);
        for (int c = 0; c < count; c += TLanes.Count)
            TLanes.Store(x + c, TLanes.Fma(scale, TLanes.Load(y + c), TLanes.Load(x + c)));
    }

    /// <summary>
    /// into[64, ValueCols] = e^b q S + P X; q is scaled by e^b in its place.
    /// </summary>
    public void Output(T* state, T* into)
    {
        ScaleRows(Q, KeyCols, Decay);
        SmallProduct<TLanes, TVector, T>.Run(Q, KeyCols, 1, state, ValueCols, into, ValueCols,
            Rows, ValueCols, KeyCols, add: false);
        SmallProduct<TLanes, TVector, T>.Run(Scores, Tokens, 1, X, ValueCols, into, ValueCols,
            Rows, ValueCols, Rows, add: true);
    }

    /// <summary>The state after the chunk; X is scaled by e^(b_last - b) in its place.</summary>
    public void Advance(T* state)
    {
        ScaleRows(X, ValueCols, Rest);
        T decay = Decay[Rows - 1];
        Scale(state, decay, KeyCols * ValueCols);
        SmallProduct<TLanes, TVector, T>.Run(K, 1, KeyCols, X, ValueCols, state, ValueCols,
            KeyCols, ValueCols, Rows, add: true);
    }

    public static void Scale(T* values, T scale, int count)
    {
        TVector factor = TLanes.Broadcast(scale);
        for (int i = 0; i < count; i += TLanes.Count)
            TLanes.Store(values + i, TLanes.Multiply(factor, TLanes.Load(values + i)));
    }

    public readonly void ScaleRows(T* values, int cols, T* scales)
    {
        for (int i = 0; i < Rows; i++) Scale(values + (i * cols), scales[i], cols);
    }

    /// <summary>log(1 + e^x), as PyTorch has it: x itself from 20 on.</summary>
    public static T SoftPlus(T x) => x > Real.Of<T>(20) ? x : T.LogP1(T.Exp(x));

    // into[64, 64] = a k^T.
    private readonly void Across(T* a, T* into) =>
        SmallProduct<TLanes, TVector, T>.Run(a, KeyCols, 1, KeysAcross, Tokens, into, Tokens,
            Rows, Tokens, KeyCols, add: false);

    // to = x * scale / |x|, zeros where there is no row; returns 1 / |x|.
    private readonly T Unit(T* x, T* to, int dim, T* row, T scale)
    {
        int c = row is null ? 0 : dim;
        new Span<T>(to + c, KeyCols - c).Clear();
        if (row is null) return T.Zero;
        T length = T.One / T.Sqrt(Cpu.Sum.SquaredDistances(x, T.Zero, dim) + s_epsilon);
        TVector first = TLanes.Broadcast(length), second = TLanes.Broadcast(scale);
        for (c = 0; c + TLanes.Count <= dim; c += TLanes.Count)
            TLanes.Store(
                to + c, TLanes.Multiply(TLanes.Multiply(TLanes.Load(x + c), first), second));
        for (; c < dim; c++) to[c] = x[c] * length * scale;
        return length;
    }
}
