using System.Numerics;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// Gradients of the delta rule, chunk by chunk from the last. With dO, and dS' of the state behind
/// the chunk (the notation of <see cref="DeltaChunk{TLanes, TVector, T}"/>, D = e^(b_last - b)):
///
///   dX = P^T dO + D k dS',  dR = (I + L)^-T dX,  dP = dO X^T,  dL = -dR X^T,  dY = -beta e^b dR
///   dv = beta dR,  dq = e^b dO S^T + (dP G) k
///   dk = (dP G)^T q + D X dS'^T + dY S^T + (N + N^T) k,  N = dL beta G
///   dS = e^b_last dS' + (e^b q)^T dO + k^T dY
///
/// and db from every exponent; dg is the sum of db from its token on. q and k here have length 1
/// (q times 1 / sqrt(KeyDim)), which their own gradients then take into account.
/// </summary>
internal readonly unsafe struct DeltaBackward<TLanes, TVector, T>(
    DeltaHeads<T> heads, Matrix<T> scratch, Matrix<T> outputGradient, Gradient<T> qkvGradient,
    Gradient<T> gatesGradient, Matrix<T> parameterSums) : IRangeBody
    where TLanes : struct, ILanes<TVector, T>
    where TVector : struct
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    private const int Tokens = DeltaChunk<TLanes, TVector, T>.Tokens;

    public static void Run(in CpuCall<T> call, DeltaHeads<T> heads)
    {
        int sequences = (int)heads.Starts.Count - 1, longest = 0;
        for (int s = 0; s < sequences; s++)
            longest = Math.Max(longest, heads.Starts[s + 1] - heads.Starts[s]);
        Matrix<T> scratch = call.Scratch(
            new Shape(call.Workers.Count, Memory.Elements(heads, longest)));
        Matrix<T> sums = call.Scratch(new Shape(sequences, 2 * heads.ValueHeads));
        new Span<T>(sums.Data, (int)sums.Count).Clear();
        call.Workers.For(sequences * heads.KeyHeads,
            new DeltaBackward<TLanes, TVector, T>(heads, scratch, call.OutputGradient,
                call.Gradient(0), call.Gradient(1), sums));
        AddSums(sums, 0, call.Gradient(2));
        AddSums(sums, heads.ValueHeads, call.Gradient(3));
    }

    public void Run(int begin, int end, int worker)
    {
        for (int item = begin; item < end; item++)
        {
            int sequence = item / heads.KeyHeads, keyHead = item % heads.KeyHeads;
            int start = heads.Starts[sequence], length = heads.Starts[sequence + 1] - start;
            if (length == 0) continue;
            var memory = new Memory(scratch.Row(worker), heads);
            Sequence(ref memory, sequence, keyHead, start, length);
        }
    }

    private static void AddSums(Matrix<T> sums, int first, Gradient<T> into)
    {
        if (!into.Wanted) return;
        for (int h = 0; h < into.Into.Count; h++)
        {
            T sum = T.Zero;
            for (int s = 0; s < sums.Rows; s++) sum += sums.Row(s)[first + h];
            into.Put(h, sum);
        }
    }

    private void Sequence(ref Memory m, int sequence, int keyHead, int start, int length)
    {
        int size = m.Chunk.KeyCols * m.Chunk.ValueCols, chunks = (length + Tokens - 1) / Tokens;
        for (int g = 0; g < heads.Group; g++)
        {
            new Span<T>(m.States + (g * chunks * size), size).Clear();
            new Span<T>(m.StateGradients + (g * size), size).Clear();
        }

        for (int c = 0; c < chunks - 1; c++)
        {
            m.Chunk.LoadKeys(heads, keyHead, start + (c * Tokens), Tokens);
            for (int g = 0; g < heads.Group; g++)
            {
                T* state = m.States + (((g * chunks) + c) * size);
                m.Chunk.LoadValues(heads, Head(keyHead, g), start + (c * Tokens));
                m.Chunk.Solve(state);
                new Span<T>(state, size).CopyTo(new Span<T>(state + size, size));
                m.Chunk.Advance(state + size);
            }
        }

        for (int c = chunks - 1; c >= 0; c--)
        {
            int first = start + (c * Tokens);
            m.Chunk.LoadKeys(heads, keyHead, first, Math.Min(Tokens, length - (c * Tokens)));
            new Span<T>(m.QueriesAcross, Tokens * m.Chunk.KeyCols).Clear();
            new Span<T>(m.KeysAcross, Tokens * m.Chunk.KeyCols).Clear();
            for (int g = 0; g < heads.Group; g++)
                ValueHead(ref m, sequence, Head(keyHead, g), first,
                    m.States + (((g * chunks) + c) * size), m.StateGradients + (g * size));
            if (qkvGradient.Wanted) PutKeys(ref m, keyHead, first);
        }
    }

    private int Head(int keyHead, int inGroup) => (keyHead * heads.Group) + inGroup;

    // Adds to dq and dk of the key head, writes dv and the gates', and takes dS' to dS.
    private void ValueHead(ref Memory m, int sequence, int head, int first, T* state, T* dState)
    {
        ref DeltaChunk<TLanes, TVector, T> chunk = ref m.Chunk;
        int rows = chunk.Rows, keys = chunk.KeyCols, values = chunk.ValueCols;
        chunk.LoadValues(heads, head, first);
        chunk.Solve(state);
        for (int i = 0; i < rows; i++)
        {
            var to = new Span<T>(m.DO + (i * values), values);
            to.Clear();
            if (i < chunk.Count)
                outputGradient.RowSpan(first + i).Slice(head * heads.ValueDim, heads.ValueDim)
                    .CopyTo(to);
        }

        // dX into DR, then dR in its place, from the last row up.
        Multiply(chunk.K, keys, 1, dState, values, m.DR, values, rows, values, keys, add: false);
        chunk.ScaleRows(m.DR, values, chunk.Rest);
        // What the decays to the end have of it: D (k dS') X.
        T restSum = T.Zero;
        for (int i = 0; i < rows; i++)
        {
            T pull = Dot(m.DR + (i * values), chunk.X + (i * values), values);
            m.DB[i] = -pull;
            restSum += pull;
        }

        restSum += chunk.Decay[rows - 1] * Dot(dState, state, keys * values);
        m.DB[rows - 1] += restSum;
        Multiply(chunk.Scores, 1, Tokens, m.DO, values, m.DR, values, rows, values, rows,
            add: true);
        SolveUpwards(ref m);
        Across(m.DO, m.DOAcross, rows, values);
        Across(m.DR, m.DRAcross, rows, values);
        Across(chunk.X, m.XAcross, rows, values);

        // A = dP and B = -dL, both [64, 64].
        Multiply(m.DO, values, 1, m.XAcross, Tokens, m.A, Tokens, rows, Tokens, values, add: false);
        Multiply(m.DR, values, 1, m.XAcross, Tokens, m.B, Tokens, rows, Tokens, values, add: false);
        for (int i = 0; i < rows; i++)
        {
            T* a = m.A + (i * Tokens), b = m.B + (i * Tokens);
            T* decays = chunk.Decays + (i * Tokens), products = chunk.KeyProducts + (i * Tokens);
            T* score = chunk.Scores + (i * Tokens), lower = chunk.Lower + (i * Tokens);
            T own = T.Zero, beta = T.Zero;
            for (int j = 0; j < i; j++)
            {
                T pull = (a[j] * score[j]) - (b[j] * lower[j]);
                own += pull;
                m.DB[j] -= pull;
                a[j] *= decays[j];
                b[j] *= -decays[j];
                beta += b[j] * products[j];
                b[j] *= chunk.Beta[i];
            }

            m.DB[i] += own;
            m.DBeta[i] = beta;
            new Span<T>(a + i + 1, Tokens - i - 1).Clear();
            new Span<T>(b + i, Tokens - i).Clear();
        }

        // dq and dk, transposed.
        AddToKeys(ref m, state, dState);
        FinishGates(ref m, sequence, head, first, state);
        AdvanceGradient(ref m, dState);
    }

    // (I + L)^T dR = dX, from the last token to the first.
    private static void SolveUpwards(ref Memory m)
    {
        int cols = m.Chunk.ValueCols;
        for (int i = m.Chunk.Rows - 1; i >= 0; i--)
        {
            for (int j = i + 1; j < m.Chunk.Rows; j++)
                DeltaChunk<TLanes, TVector, T>.Subtract(m.DR + (i * cols), m.DR + (j * cols),
                    m.Chunk.Lower[(j * Tokens) + i], cols);
        }
    }

    private static void AddToKeys(ref Memory m, T* state, T* dState)
    {
        ref DeltaChunk<TLanes, TVector, T> chunk = ref m.Chunk;
        int rows = chunk.Rows, keys = chunk.KeyCols, values = chunk.ValueCols;
        // (dP G)^T for dq; N + N^T for dk.
        Across(m.A, m.C, rows, Tokens);
        Multiply(chunk.KeysAcross, Tokens, 1, m.C, Tokens, m.QueriesAcross, Tokens, keys, Tokens,
            rows, add: true);
        Multiply(chunk.Q, 1, keys, m.A, Tokens, m.KeysAcross, Tokens, keys, Tokens, rows,
            add: true);
        Across(m.B, m.C, rows, Tokens);
        for (int i = 0; i < rows * Tokens; i++) m.C[i] += m.B[i];
        Multiply(chunk.KeysAcross, Tokens, 1, m.C, Tokens, m.KeysAcross, Tokens, keys, Tokens, rows,
            add: true);
        // Columns of dO, X and dR are scaled in their places: nothing reads them unscaled after.
        ScaleColumns(m.DOAcross, values, chunk.Decay, rows);
        Multiply(state, values, 1, m.DOAcross, Tokens, m.QueriesAcross, Tokens, keys, Tokens,
            values, add: true);
        ScaleColumns(m.XAcross, values, chunk.Rest, rows);
        Multiply(dState, values, 1, m.XAcross, Tokens, m.KeysAcross, Tokens, keys, Tokens, values,
            add: true);
        for (int i = 0; i < rows; i++) m.Scales[i] = -chunk.Beta[i] * chunk.Decay[i];
        ScaleColumns(m.DRAcross, values, m.Scales, rows);
        Multiply(state, values, 1, m.DRAcross, Tokens, m.KeysAcross, Tokens, keys, Tokens, values,
            add: true);
    }

    // dv and dbeta of R = beta (v - e^b k S), db of e^b, and what the gates' inputs have of them.
    private void FinishGates(ref Memory m, int sequence, int head, int first, T* state)
    {
        ref DeltaChunk<TLanes, TVector, T> chunk = ref m.Chunk;
        int rows = chunk.Rows, keys = chunk.KeyCols, values = chunk.ValueCols;
        new Span<T>(chunk.Q, rows * keys).CopyTo(new Span<T>(m.Q, rows * keys));
        chunk.ScaleRows(m.Q, keys, chunk.Decay);
        Multiply(m.Q, keys, 1, state, values, m.Read, values, rows, values, keys, add: false);
        for (int i = 0; i < rows; i++)
        {
            T* dr = m.DR + (i * values), read = chunk.Read + (i * values);
            T withValue = Dot(dr, chunk.V + (i * values), values);
            T withRead = chunk.Decay[i] * Dot(dr, read, values);
            m.DBeta[i] += withValue - withRead;
            m.DB[i] += Dot(m.DO + (i * values), m.Read + (i * values), values)
                - (chunk.Beta[i] * withRead);
        }

        T sum = T.Zero, strength = T.Exp(heads.ALog[head]), bias = heads.DtBias[head];
        T logSum = T.Zero, biasSum = T.Zero;
        for (int i = rows - 1; i >= 0; i--)
        {
            sum += m.DB[i];
            if (i >= chunk.Count) continue;
            T* gates = heads.Gates.Row(first + i);
            T da = -sum * strength
                * VectorMath.Sigmoid(gates[heads.ValueHeads + head] + bias);
            logSum += sum * chunk.Gate[i];
            biasSum += da;
            if (gatesGradient.Wanted)
            {
                long row = (long)(first + i) * 2 * heads.ValueHeads;
                T beta = chunk.Beta[i];
                gatesGradient.Put(row + head, m.DBeta[i] * beta * (T.One - beta));
                gatesGradient.Put(row + heads.ValueHeads + head, da);
            }

            if (!qkvGradient.Wanted) continue;
            long at = ((long)(first + i) * heads.Qkv.Cols) + heads.ValueColumn(head);
            for (int c = 0; c < heads.ValueDim; c++)
                qkvGradient.Put(at + c, chunk.Beta[i] * m.DR[(i * values) + c]);
        }

        parameterSums.Row(sequence)[head] += logSum;
        parameterSums.Row(sequence)[heads.ValueHeads + head] += biasSum;
    }

    // dS' to dS.
    private static void AdvanceGradient(ref Memory m, T* dState)
    {
        ref DeltaChunk<TLanes, TVector, T> chunk = ref m.Chunk;
        int rows = chunk.Rows, keys = chunk.KeyCols, values = chunk.ValueCols;
        DeltaChunk<TLanes, TVector, T>.Scale(dState, chunk.Decay[rows - 1], keys * values);
        Multiply(m.Q, 1, keys, m.DO, values, dState, values, keys, values, rows, add: true);
        chunk.ScaleRows(m.DR, values, m.Scales);
        Multiply(chunk.K, 1, keys, m.DR, values, dState, values, keys, values, rows, add: true);
    }

    // The gradients of q and k before they were made of length 1: x / |x| has n (d - u (u d)), u
    // the result and n = 1 / |x|.
    private void PutKeys(ref Memory m, int keyHead, int first)
    {
        ref DeltaChunk<TLanes, TVector, T> chunk = ref m.Chunk;
        T root = T.Sqrt(Real.Of<T>(heads.KeyDim));
        for (int i = 0; i < chunk.Count; i++)
        {
            long row = (long)(first + i) * heads.Qkv.Cols;
            T* q = chunk.Q + (i * chunk.KeyCols), k = chunk.K + (i * chunk.KeyCols);
            Put(row + (keyHead * heads.KeyDim), q, root, m.QueriesAcross + i, chunk.QueryScale[i]);
            Put(row + heads.KeyColumn(keyHead), k, T.One, m.KeysAcross + i, chunk.KeyScale[i]);
        }
    }

    private void Put(long at, T* x, T root, T* gradient, T scale)
    {
        T pull = T.Zero, inverse = T.One / root;
        for (int c = 0; c < heads.KeyDim; c++) pull += x[c] * gradient[c * Tokens];
        for (int c = 0; c < heads.KeyDim; c++)
            qkvGradient.Put(
                at + c, scale * ((gradient[c * Tokens] * inverse) - (x[c] * root * pull)));
    }

    private static void Multiply(T* a, nint aRow, nint aCol, T* b, nint bRow, T* c, nint cRow,
        int m, int n, int k, bool add) =>
        SmallProduct<TLanes, TVector, T>.Run(a, aRow, aCol, b, bRow, c, cRow, m, n, k, add);

    private static T Dot(T* a, T* b, int count)
    {
        TVector sum = default;
        for (int i = 0; i < count; i += TLanes.Count)
            sum = TLanes.Fma(TLanes.Load(a + i), TLanes.Load(b + i), sum);
        return TLanes.Sum(sum);
    }

    // to[cols, 64] = from[rows, cols]^T.
    private static void Across(T* from, T* to, int rows, int cols)
    {
        for (int i = 0; i < rows; i++)
            for (int c = 0; c < cols; c++) to[(c * Tokens) + i] = from[(i * cols) + c];
    }

    private static void ScaleColumns(T* values, int count, T* scales, int rows)
    {
        for (int c = 0; c < count; c++)
            for (int i = 0; i < rows; i++) values[(c * Tokens) + i] *= scales[i];
    }

    /// <summary>Scratch of one thread.</summary>
    private ref struct Memory
    {
        public DeltaChunk<TLanes, TVector, T> Chunk;

        /// <summary>dO, dR, e^b q S; e^b q.</summary>
        public T* DO, DR, Read, Q;

        /// <summary>Transposed: dO, dR, X, dq and dk.</summary>
        public T* DOAcross, DRAcross, XAcross, QueriesAcross, KeysAcross;

        /// <summary>[64, 64]: dP G, N, and one of them transposed.</summary>
        public T* A, B, C;

        /// <summary>Per token.</summary>
        public T* DB, DBeta, Scales;

        /// <summary>States at the starts of chunks, per value head of the group; their gradient.
        /// </summary>
        public T* States, StateGradients;

        public Memory(T* memory, in DeltaHeads<T> heads)
        {
            var (keys, values) = Cols(heads);
            Chunk = new(memory, keys, values);
            memory += DeltaChunk<TLanes, TVector, T>.Elements(keys, values);
            DO = Take(ref memory, Tokens * values);
            DR = Take(ref memory, Tokens * values);
            Read = Take(ref memory, Tokens * values);
            Q = Take(ref memory, Tokens * keys);
            DOAcross = Take(ref memory, Tokens * values);
            DRAcross = Take(ref memory, Tokens * values);
            XAcross = Take(ref memory, Tokens * values);
            QueriesAcross = Take(ref memory, Tokens * keys);
            KeysAcross = Take(ref memory, Tokens * keys);
            A = Take(ref memory, Tokens * Tokens);
            B = Take(ref memory, Tokens * Tokens);
            C = Take(ref memory, Tokens * Tokens);
            DB = Take(ref memory, Tokens);
            DBeta = Take(ref memory, Tokens);
            Scales = Take(ref memory, Tokens);
            StateGradients = Take(ref memory, heads.Group * keys * values);
            States = memory;
        }

        public static int Elements(in DeltaHeads<T> heads, int length)
        {
            var (keys, values) = Cols(heads);
            int chunks = (length + Tokens - 1) / Tokens;
            return checked(DeltaChunk<TLanes, TVector, T>.Elements(keys, values)
                + (6 * Tokens * values) + (3 * Tokens * keys) + (3 * Tokens * Tokens)
                + (3 * Tokens) + (heads.Group * (chunks + 1) * keys * values));
        }

        private static (int Keys, int Values) Cols(in DeltaHeads<T> heads) =>
            (DeltaChunk<TLanes, TVector, T>.Padded(heads.KeyDim),
            DeltaChunk<TLanes, TVector, T>.Padded(heads.ValueDim));

        private static T* Take(ref T* memory, int count) =>
            DeltaChunk<TLanes, TVector, T>.Take(ref memory, count);
    }
}
