using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Ops;

/// <summary>
/// Linear attention whose state forgets and corrects itself, per value head over packed sequences:
///
///   S_t = e^g_t S_t-1 + k_t d_t^T,  d_t = beta_t (v_t - e^g_t S_t-1^T k_t),  o_t = S_t^T q_t,
///
/// beta = sigmoid(b), g = -e^a_log softplus(a + dt_bias), q and k of length 1 (epsilon 1e-6 under
/// the root) and q divided by sqrt(KeyDim). Value head h uses key head h / (ValueHeads / KeyHeads).
/// qkv[tokens, (2 KeyHeads KeyDim) + ValueHeads ValueDim]: q, k and v side by side, each head by
/// head; gates[tokens, 2 ValueHeads]: b and a side by side; a_log and dt_bias[ValueHeads];
/// cu_seqlens I32[sequences + 1] -> o[tokens, ValueHeads * ValueDim]; saves nothing. S starts at 0
/// in every sequence or, for generation, at state[sequences * ValueHeads * KeyDim, ValueDim] in the
/// type of statistics, which is left as it is after the sequence; there is no gradient then.
/// Gated delta networks, Yang et al. 2024, in chunks (Yang et al. 2024b): see
/// <see cref="DeltaChunk{TLanes, TVector, T}"/>.
/// </summary>
/// <exception cref="ShapeException">
/// A shape does not fit, the starts do not cover the tokens, or a state comes into a run whose
/// backward is to follow.
/// </exception>
public sealed record DeltaRule(int KeyHeads, int ValueHeads, int KeyDim, int ValueDim)
    : Op("delta_rule")
{
    private const int Qkv = 0, Gates = 1, ALog = 2, DtBias = 3, Starts = 4, State = 5;

    public override Outputs Infer(ReadOnlySpan<Spec> inputs, DType activations)
    {
        if (KeyHeads < 1 || ValueHeads < KeyHeads || ValueHeads % KeyHeads != 0 || KeyDim < 1
            || ValueDim < 1)
            throw new ShapeException($"{Name}: {ValueHeads} value heads of {ValueDim} are not a "
                + $"multiple of {KeyHeads} key heads of {KeyDim}");
        Spec qkv = inputs.FloatMatrix(this, Qkv, "qkv");
        int tokens = qkv.Shape[0];
        qkv.MustBe(this, "qkv", tokens, (2 * KeyHeads * KeyDim) + (ValueHeads * ValueDim));
        inputs.Float(this, Gates, "gates").MustBe(this, "gates", tokens, 2 * ValueHeads);
        inputs.Float(this, ALog, "a_log").MustBe(this, "a_log", ValueHeads);
        inputs.Float(this, DtBias, "dt_bias").MustBe(this, "dt_bias", ValueHeads);
        Spec starts = inputs.Int(this, Starts, "cu_seqlens");
        if (starts.Shape.Rank != 1 || starts.Shape.Count < 1)
            throw this.Wrong("cu_seqlens", "a list of starts and the end", starts);
        if (State < inputs.Length && inputs[State].Exists)
        {
            Spec state = inputs.FloatMatrix(this, State, "state");
            int heads = checked(((int)starts.Shape.Count - 1) * ValueHeads);
            state.MustBe(this, "state", heads * KeyDim, ValueDim);
            if (state.Type != activations.Statistics())
                throw this.Wrong("state", $"of {activations.Statistics()}", state);
        }

        return new(new Spec(activations, new Shape(tokens, ValueHeads * ValueDim)));
    }

    public override bool Differentiates(int input) => input <= DtBias;

    public override void CpuForward<T>(in CpuCall<T> call) =>
        CpuDeltaRule.Forward(call, Heads(call));

    public override void CpuBackward<T>(in CpuCall<T> call) =>
        CpuDeltaRule.Backward(call, Heads(call));

    public override void CudaForward(in CudaCall call)
    {
        Tensor state = call.Input(State);
        if (call.Recorded && state.Exists) throw PackedRows.HasNoGradient(this);
        new CudaDeltaRule(call, KeyHeads, ValueHeads, KeyDim, ValueDim, state).Output(call);
    }

    public override void CudaBackward(in CudaCall call) =>
        new CudaDeltaRule(call, KeyHeads, ValueHeads, KeyDim, ValueDim, Tensor.None)
            .Backward(call);

    private DeltaHeads<T> Heads<T>(in CpuCall<T> call)
        where T : unmanaged, System.Numerics.IBinaryFloatingPointIeee754<T>
    {
        Matrix<int> starts = call.Ints(Starts);
        Matrix<T> qkv = call.In(Qkv);
        PackedRows.MustCover(this, starts, qkv.Rows);
        if (call.Recorded && call.Input(State).Exists) throw PackedRows.HasNoGradient(this);
        return new()
        {
            KeyHeads = KeyHeads,
            ValueHeads = ValueHeads,
            KeyDim = KeyDim,
            ValueDim = ValueDim,
            Qkv = qkv,
            Gates = call.In(Gates),
            ALog = call.In(ALog),
            DtBias = call.In(DtBias),
            Starts = starts,
            State = call.In(State),
        };
    }
}
