using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>The part of a decoder's layer in which every token is by itself.</summary>
internal abstract class FeedForward
{
    /// <summary>Its linear layers.</summary>
    public Projection[] Projections { get; protected init; } = [];

    /// <summary>Whether anything in it besides those is trained.</summary>
    public bool Trainable { get; protected init; }

    /// <summary>Whether backward reads the normalised rows that it runs on.</summary>
    public abstract bool ReadsInput { get; }

    /// <summary>
    /// a[tokens, width], which it drops, -> what is added to the rows, fleeting.
    /// </summary>
    /// <param name="graph">The tape.</param>
    /// <param name="a">The rows.</param>
    /// <param name="again">Whether its inner rows are made again in backward.</param>
    public abstract Tensor Run(Graph graph, Tensor a, bool again);

    /// <summary>What a layer of this decoder has.</summary>
    public static FeedForward Of(DecoderSpec spec, ModuleScope scope) => spec.Experts is { } experts
        ? new SparseFeedForward(spec, experts, scope) : new GatedFeedForward(spec, scope);
}

/// <summary>W (silu(G a) * U a), of gate_proj, up_proj and down_proj.</summary>
internal sealed class GatedFeedForward : FeedForward
{
    private static readonly SwiGlu s_swiGlu = new();

    private readonly Projections _gateAndUp;
    private readonly Projection _down;

    public GatedFeedForward(DecoderSpec spec, ModuleScope scope)
    {
        int width = spec.HiddenSize, inner = spec.IntermediateSize;
        Projection gate = scope.Linear("gate_proj", width, inner, bias: false);
        Projection up = scope.Linear("up_proj", width, inner, bias: false);
        _gateAndUp = new Projections([gate, up], [inner, inner]);
        _down = scope.Linear("down_proj", inner, width, bias: false);
        scope.Module("act_fn");
        Projections = [gate, up, _down];
    }

    public override bool ReadsInput => _gateAndUp.ReadsInput;

    public override Tensor Run(Graph graph, Tensor a, bool again)
    {
        Tensor inner = Inner(graph, a, again);
        graph.Drop(a);
        Tensor down = _down.RunFleeting(graph, inner);
        graph.Drop(inner);
        return down;
    }

    /// <summary>The same, which does not drop a, and is kept unless it is made again.</summary>
    public Tensor RunBeside(Graph graph, Tensor a, bool again)
    {
        Tensor inner = Inner(graph, a, again);
        Tensor down = again ? _down.RunFleeting(graph, inner) : _down.Run(graph, inner);
        graph.Drop(inner);
        return down;
    }

    private Tensor Inner(Graph graph, Tensor a, bool again)
    {
        Span<Tensor> y = [Tensor.None, Tensor.None];
        _gateAndUp.Run(graph, a, y, fleeting: again);
        Tensor inner = graph.RunFleeting(s_swiGlu, y[0], y[1]);
        graph.Drop(y[0]);
        return inner;
    }
}

/// <summary>
/// Qwen's mixture of experts: of many small gated feed-forwards those that a router chooses for
/// each token, weighted (<see cref="Experts"/>), and one, gated, that every token goes to. The
/// experts' matrices lie in two parameters, which are no linear layers to PEFT and to what
/// quantises: they are frozen as they are stored, with adapters where target_parameters names them,
/// or trained whole.
/// </summary>
internal sealed class SparseFeedForward : FeedForward
{
    private static readonly Linear s_linear = new();
    private static readonly GatedAdd s_add = new();

    private readonly Experts _experts;
    private readonly Tensor _router;
    private readonly ExpertMatrices _gateAndUp, _down;
    private readonly GatedFeedForward _shared;
    private readonly Projection _sharedGate;

    public SparseFeedForward(DecoderSpec spec, ExpertsSpec experts, ModuleScope scope)
    {
        int width = spec.HiddenSize;
        _experts = new Experts(experts.Chosen);
        _router = scope.In("gate").Matrix("weight", experts.Count, width);
        ModuleScope all = scope.In("experts");
        _gateAndUp = all.Experts("gate_up_proj", experts.Count, 2 * experts.Inner, width);
        _down = all.Experts("down_proj", experts.Count, width, experts.Inner);
        all.Module("act_fn");
        _shared = new GatedFeedForward(spec, scope.In("shared_expert"));
        _sharedGate = scope.Linear("shared_expert_gate", width, 1, bias: false);
        Projections = [.. _shared.Projections, _sharedGate];
        Trainable = _router.Variable != 0 || _gateAndUp.Trainable || _down.Trainable;
    }

    public override bool ReadsInput => _router.Variable != 0 || _gateAndUp.Trainable
        || _shared.ReadsInput || _sharedGate.ReadsInput;

    public override Tensor Run(Graph graph, Tensor a, bool again)
    {
        Tensor logits = graph.RunFleeting(s_linear, a, _router);
        Tensor routed =
            graph.RunFleeting(_experts, a, logits, _gateAndUp.Of(graph), _down.Of(graph));
        graph.Drop(logits);
        Tensor shared = _shared.RunBeside(graph, a, again);
        Tensor gate = _sharedGate.Run(graph, a);
        graph.Drop(a);
        Tensor y = graph.RunFleeting(s_add, routed, shared, gate);
        graph.Drop(routed);
        graph.Drop(shared);
        return y;
    }
}

/// <summary>Matrices of experts, one behind the other, with their adapters where they have
/// any.</summary>
/// <param name="matrices">[experts * outputs, inputs].</param>
/// <param name="low">Of them A[experts * rank, inputs] and B[experts * outputs, rank].</param>
public sealed class ExpertMatrices(Tensor matrices, LowRankPart? low)
{
    private readonly AdaptedMatrices? _op =
        low is null ? null : new(low.Adapter.Experts, low.Adapter.Scale);

    public bool Trainable => matrices.Variable != 0 || low is not null;

    /// <summary>What rows are multiplied by.</summary>
    public Tensor Of(Graph graph) =>
        _op is null ? matrices : graph.Run(_op, matrices, low!.A, low.B);
}
