using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// o = softmax(Scale * q k^T + mask) v per head, over packed sequences of different lengths.
/// q[tokens, Heads * HeadDim], k and v[keyTokens, KvHeads * HeadDim], cu_seqlens_q and cu_seqlens_k
/// I32[sequences + 1] (starts and the end), optional key_lengths I32[sequences] (keys from there on
/// are masked) -> o like q; saves lse[tokens, Heads]. Causal: a query sees the keys up to its own
/// position, counted from the end. Cached: a sequence's keys are rows of a cache with room for
/// more, the first key_lengths of them count, and the position is counted from their end.
/// Key head j serves the query heads j g .. j g + g - 1, g = Heads / KvHeads. Optional lists of the
/// tiles of queries and of keys, I32[tiles, 8], made once per batch (<see cref="AttentionTiles"/>),
/// spare the GPU making them in every call. See <see cref="FlashAttention"/>.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, the starts do not cover the tokens, or a cache comes without key_lengths.
/// </exception>
public sealed unsafe record Attention(int Heads, int KvHeads, int HeadDim, bool Causal,
    double Scale, bool Cached = false)
    : Op("attention")
{
    // Kernels of sm_80 and of sm_90a, where the head dimension has them.
    private readonly string _forward = $"attention_forward_{HeadDim}";
    private readonly string _backward = $"attention_backward_{HeadDim}";
    private readonly string _hopperForward = $"attention_forward_hopper_{HeadDim}";
    private readonly string _hopperBackward = $"attention_backward_hopper_{HeadDim}";

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        Spec q = inputs.Float(this, 0, "q"), k = inputs.Float(this, 1, "k");
        Spec v = inputs.Float(this, 2, "v");
        Columns(q, "q", Heads);
        Columns(k, "k", KvHeads);
        v.MustHaveShape(this, "v", k.Shape);
        Spec starts = inputs.Int(this, 3, "cu_seqlens_q");
        int sequences = (int)starts.Shape.Count - 1;
        if (sequences < 0) throw this.Wrong("cu_seqlens_q", "the starts and the end", starts);
        starts.MustBe(this, "cu_seqlens_q", sequences + 1);
        inputs.Int(this, 4, "cu_seqlens_k").MustBe(this, "cu_seqlens_k", sequences + 1);
        if (Cached || (inputs.Length > 5 && inputs[5].Exists))
            inputs.Int(this, 5, "key_lengths").MustBe(this, "key_lengths", sequences);
        CheckTiles(inputs, 6, "query_tiles");
        CheckTiles(inputs, 7, "key_tiles");
        return new(q.As(activations),
            new Spec(activations.Statistics(), new Shape((int)q.Shape.Rows, Heads)));
    }

    public override bool Differentiates(int input) => input < 3;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        FlashAttention.Forward(call.Workers, Arguments(call, backward: false));

    /// <exception cref="ShapeException">Heads, head dimension or scale make no sense, or are more
    /// than the kernels take. The device's next read throws where starts do not cover the
    /// tokens.</exception>
    public override void CudaForward(in CudaCall call)
    {
        const int Threads = 128, OtherRows = KernelConstants.AttentionAnyRows;
        const int OtherKeys = KernelConstants.AttentionAnyKeys;
        RequireLaunchable();
        Tensor q = call.In(0), k = call.In(1), v = call.In(2), o = call.Output;
        bool aligned = (q.Data | k.Data | v.Data | o.Data) % 16 == 0;
        int sequences = (int)call.Input(3).Shape.Count - 1;
        if (Cached && aligned && HeadDim % 8 == 0 && q.Shape.Rows > 0 && q.Shape.Rows <= sequences)
        {
            Decode(call);
            return;
        }

        Tensor lengths = call.Input(5), tiles = Tiles(call, ofKeys: false);
        if (aligned && call.Has(_hopperForward))
        {
            call.Launch(_hopperForward,
                new Grid(Math.Min(checked(tiles.Shape[0] * Heads), call.Multiprocessors),
                    HopperThreads, HopperShared()),
                o, call.Saved(0), q, k, v, tiles, lengths, tiles.Shape[0], Heads, KvHeads,
                CausalMode, Scale);
            return;
        }

        if (aligned && AttentionLaunch.Forward(HeadDim, call.SmallShared) is { } launch
            && call.Real != DType.F32)
        {
            call.Launch(_forward, launch.Grid(tiles.Shape[0], Heads),
                o, call.Saved(0), q, k, v, tiles, lengths, Heads, KvHeads, CausalMode, Scale);
            return;
        }

        int width = (HeadDim + 31) / 32 * 32;
        int shared = sizeof(float) * ((OtherRows * width) + (2 * OtherKeys * (width + 1)));
        int blocks = checked(tiles.Shape[0] * (AttentionTiles.Rows / OtherRows) * Heads);
        call.Launch("attention_forward_any", new Grid(blocks, Threads, shared), o, call.Saved(0),
            q, k, v, tiles, lengths, Heads, KvHeads, CausalMode, Scale, HeadDim);
    }

    public override void CpuBackward<T>(in CpuCall<T> call) =>
        FlashAttention.Backward(call.Workers, Arguments(call, backward: true),
            new AttentionGradients<T>
            {
                DO = call.OutputGradient.Data,
                DOStride = call.OutputGradient.Cols,
                DQ = Target(call.Gradient(0)),
                DK = Target(call.Gradient(1)),
                DV = Target(call.Gradient(2)),
            });

    private const int HopperThreads = 384;

    // One query of each sequence: blocks share its keys, in so many parts as keep the GPU busy.
    private void Decode(in CudaCall call)
    {
        const int Threads = 128, Eights = 8 * Threads, MostSplits = 32;
        const int LeastKeys = 4 * KernelConstants.AttentionDecodeKeys;
        Tensor q = call.In(0), k = call.In(1), starts = call.Input(3);
        int tokens = (int)q.Shape.Rows, keys = (int)k.Shape.Rows;
        int sequences = (int)starts.Shape.Count - 1, group = Heads / KvHeads;
        int blocks = KvHeads * ((group + KernelConstants.AttentionDecodeHeads - 1)
            / KernelConstants.AttentionDecodeHeads);
        int room = (keys + sequences - 1) / sequences;
        int splits = Math.Clamp(4 * call.Multiprocessors / (tokens * blocks), 1,
            Math.Clamp(room / LeastKeys, 1, MostSplits));
        Tensor parts = splits == 1 ? Tensor.None
            : call.Scratch(DType.F32, splits, tokens * Heads, HeadDim + 2);
        int shared = sizeof(float)
            * ((KernelConstants.AttentionDecodeHeads * HeadDim) + Eights);
        call.Launch("attention_decode",
            new Grid(new Dim3(splits * blocks, tokens), Threads, shared), call.Output,
            call.Saved(0), parts, q, k, call.In(2), starts, call.Input(4), call.Input(5),
            call.Faults, sequences, tokens, keys, CausalMode, Heads, KvHeads, HeadDim, Scale,
            splits);
        if (splits > 1)
            call.Launch("attention_decode_merge", new Grid(new Dim3(Heads, tokens), Threads),
                call.Output, call.Saved(0), parts, starts, call.Input(4), call.Input(5), sequences,
                tokens, keys, CausalMode, Heads, HeadDim, Scale, splits);
    }

    // The mask as kernels take it: none, from the end of the room, or of the keys that count.
    private int CausalMode => !Causal ? 0 : Cached ? 2 : 1;

    // A tile of queries and, up to 128 columns, one of output; two of keys and of values; barriers;
    // and room to start at a multiple of 1024.
    private int HopperShared()
    {
        const int RowBytes = 128, ChunkCols = 64, Barriers = 128, Alignment = 1024;
        int chunks = (HeadDim + ChunkCols - 1) / ChunkCols;
        int rows = HeadDim > 128
            ? AttentionTiles.Rows + (4 * 64) : (2 * AttentionTiles.Rows) + (4 * 128);
        return (chunks * rows * RowBytes) + Barriers + Alignment;
    }

    // What the CPU's kernels check themselves.
    private void RequireLaunchable()
    {
        const int LargestHeadDim = KernelConstants.AttentionMostCols;
        if (KvHeads < 1 || Heads < 1 || Heads % KvHeads != 0)
            throw new ShapeException(
                $"{Name}: {Heads} query heads are not a multiple of {KvHeads} key heads");
        if (HeadDim is < 1 or > LargestHeadDim)
            throw new ShapeException(
                $"{Name}: head dimension is {HeadDim}, expected 1 to {LargestHeadDim} on a GPU");
        if (!(Scale > 0) || double.IsInfinity(Scale))
            throw new ShapeException($"{Name}: scale is {Scale}, expected a number above 0");
    }

    /// <inheritdoc cref="CudaForward"/>
    public override void CudaBackward(in CudaCall call)
    {
        RequireLaunchable();
        Tensor q = call.In(0), k = call.In(1), v = call.In(2), dO = call.OutputGradient;
        Tensor startsQ = call.Input(3), startsK = call.Input(4), lengths = call.Input(5);
        int tokens = (int)q.Shape.Rows, keyTokens = (int)k.Shape.Rows;
        int sequences = (int)startsQ.Shape.Count - 1;
        Tensor statistics = call.Scratch(DType.F32, Heads, tokens, 2);
        bool aligned = (q.Data | k.Data | v.Data | dO.Data | call.AnyGradient(0).Buffer.Data
            | call.AnyGradient(1).Buffer.Data | call.AnyGradient(2).Buffer.Data) % 16 == 0;
        if (aligned && call.Has(_hopperBackward))
        {
            Statistics(call, statistics, Tensor.None, Tensor.None);
            HopperAttentionBackward.Run(call, this, _hopperBackward, CausalMode, statistics,
                Tiles(call, ofKeys: false), Tiles(call, ofKeys: true));
            return;
        }

        GradientTarget dq = call.Gradient(0), dk = call.Gradient(1), dv = call.Gradient(2);
        if (AttentionLaunch.Backward(HeadDim, call.SmallShared) is { } launch
            && call.Real != DType.F32 && aligned)
        {
            // Blocks that have begun, and per head and query those that have added to its dq.
            Tensor turns = call.Scratch(DType.I32, checked(1 + (Heads * tokens)));
            Statistics(call, statistics, turns, dq.Accumulate ? Tensor.None : dq.Buffer);
            Tensor list = Tiles(call, ofKeys: true);
            int parts = KeyParts(call, (keyTokens + launch.Rows - 1) / launch.Rows);
            Tensor sums = dq.Wanted
                ? call.Scratch(DType.F32, tokens, Heads * HeadDim) : Tensor.None;
            Tensor dkParts = Parts(call, dk, parts), dvParts = Parts(call, dv, parts);
            call.Launch(_backward,
                launch.Grid(list.Shape[0], KvHeads * parts), dq.Buffer,
                parts > 1 ? Tensor.None : dk.Buffer, parts > 1 ? Tensor.None : dv.Buffer,
                sums, dkParts, dvParts, turns, q, k, v, dO, statistics, list, lengths, tokens,
                keyTokens, CausalMode, Heads, KvHeads, Scale, dq.Accumulate, dk.Accumulate,
                dv.Accumulate, parts);
            AddParts(call, dkParts, dk);
            AddParts(call, dvParts, dv);
            return;
        }

        const int Rows = KernelConstants.AttentionAnyBackwardRows, Threads = 256;
        Statistics(call, statistics, Tensor.None, Tensor.None);
        if (dk.Wanted || dv.Wanted)
        {
            call.Launch("attention_keys_backward",
                Grid.SequenceTiles(keyTokens, sequences, Rows, KvHeads, Threads),
                dk.Buffer, dv.Buffer, q, k, v, dO, statistics, startsQ, startsK, lengths,
                call.Faults, sequences, tokens, keyTokens, CausalMode, Heads, KvHeads, HeadDim,
                Scale, dk.Accumulate, dv.Accumulate);
        }

        if (dq.Wanted)
        {
            call.Launch("attention_queries_backward",
                Grid.SequenceTiles(tokens, sequences, Rows, Heads, Threads),
                dq.Buffer, q, k, v, dO, statistics, startsQ, startsK, lengths, call.Faults,
                sequences, tokens, keyTokens, CausalMode, Heads, KvHeads, HeadDim, Scale,
                dq.Accumulate);
        }
    }

    // lse and delta of each head and token.
    private void Statistics(in CudaCall call, in Tensor statistics, in Tensor turns, in Tensor dq)
    {
        int tokens = (int)call.Output.Shape.Rows;
        call.Launch("attention_statistics",
            Grid.SequenceTiles(Math.Max(1, tokens), 0, 8, Heads, 256), statistics, turns, dq,
            call.OutputGradient, call.Output, call.Saved(0), tokens, Heads, HeadDim);
    }

    // Into how many blocks the query heads of a key head are divided, whose parts of dk and dv are
    // then added: as few as keep the longest block below half of what a multiprocessor does in all.
    private int KeyParts(in CudaCall call, int tiles)
    {
        int group = Heads / KvHeads, work = tiles * Heads / (Causal ? 2 : 1);
        int heads = Math.Clamp(work / call.Multiprocessors / 2, 1, group);
        return (group + heads - 1) / heads;
    }

    private static Tensor Parts(in CudaCall call, GradientTarget gradient, int parts) =>
        parts == 1 || !gradient.Wanted ? Tensor.None
            : call.Scratch(DType.F32, parts, checked((int)gradient.Buffer.Shape.Count));

    private static void AddParts(in CudaCall call, in Tensor parts, GradientTarget gradient)
    {
        if (!parts.Exists) return;
        int count = parts.Shape.Cols;
        call.Launch("sum_parts_to_real", Grid.Elements(count / 4), gradient.Buffer, parts,
            (int)parts.Shape.Rows, count, gradient.Accumulate, call.Faults);
    }

    // The list of tiles that came with the batch, else one that the device makes.
    private static Tensor Tiles(in CudaCall call, bool ofKeys)
    {
        Tensor tiles = call.Input(ofKeys ? 7 : 6), startsQ = call.Input(3);
        if (tiles.Exists) return tiles;
        int tokens = (int)call.Input(0).Shape.Rows, keyTokens = (int)call.Input(1).Shape.Rows;
        int sequences = (int)startsQ.Shape.Count - 1;
        int count = Math.Max(
            1, ((ofKeys ? keyTokens : tokens) / AttentionTiles.Rows) + sequences);
        tiles = call.Scratch(DType.I32, count, AttentionTiles.Fields);
        call.Launch("attention_tiles", Grid.Blocks256((count + 7) / 8), tiles, startsQ,
            call.Input(4), call.Faults, sequences, tokens, keyTokens, count, ofKeys ? 1 : 0);
        return tiles;
    }

    private AttentionArguments<T> Arguments<T>(in CpuCall<T> call, bool backward)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> q = call.In(0), k = call.In(1), v = call.In(2), lse = call.Saved(0);
        Matrix<int> startsQ = call.Ints(3), startsK = call.Ints(4);
        Cover("cu_seqlens_q", startsQ, q.Rows);
        Cover("cu_seqlens_k", startsK, k.Rows);
        var arguments = new AttentionArguments<T>
        {
            Q = q.Data,
            K = k.Data,
            V = v.Data,
            O = call.Output.Data,
            Lse = lse.Data,
            QStride = q.Cols,
            KStride = k.Cols,
            VStride = v.Cols,
            OStride = q.Cols,
            Heads = Heads,
            KvHeads = KvHeads,
            HeadDim = HeadDim,
            Sequences = (int)startsQ.Count - 1,
            CuSeqlensQ = startsQ.Data,
            CuSeqlensK = startsK.Data,
            KeyLengths = call.Input(5).Exists ? call.Ints(5).Data : null,
            Causal = Causal,
            Cached = Cached,
            Scale = Real.Of<T>(Scale),
            Scratch = null,
        };
        long bytes = backward
            ? FlashAttention.BackwardScratchBytes(arguments, call.Workers.Count)
            : FlashAttention.ScratchBytes<T>(HeadDim, call.Workers.Count);
        return arguments with
        {
            Scratch = (byte*)call.Scratch(new Shape(checked((int)(bytes / sizeof(T))))).Data,
        };
    }

    private static AttentionTarget<T> Target<T>(Gradient<T> gradient)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T> => new()
        {
            Data = gradient.Into.Data,
            Stride = gradient.Into.Cols,
            Accumulate = gradient.Accumulate,
        };

    private void CheckTiles(ReadOnlySpan<Spec> inputs, int input, string name)
    {
        if (input >= inputs.Length || !inputs[input].Exists) return;
        Spec tiles = inputs.Int(this, input, name);
        tiles.MustBe(this, name, (int)tiles.Shape.Rows, AttentionTiles.Fields);
    }

    private void Columns(Spec spec, string name, int heads)
    {
        if (spec.Shape.Cols != heads * HeadDim)
            throw this.Wrong(name, $"{heads} heads of {HeadDim} columns", spec);
    }

    private void Cover(string name, Matrix<int> starts, int tokens)
    {
        int first = starts[0], end = starts[(int)starts.Count - 1];
        if (first != 0 || end != tokens)
            throw new ShapeException(
                $"{Name}: {name} runs from {first} to {end}, expected 0 to {tokens}, the tokens");
    }
}
