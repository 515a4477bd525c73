using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Where a module's constructor gets its parameters. The constructor is the only place that knows
/// them: it names each with its shape, in state_dict's order, and gets what to compute with. Run
/// against no tensors, the same constructors describe the model (<see cref="ParameterTable"/>:
/// parameters, parts, decay, modules that adapters may sit on); run against a checkpoint and the
/// trained ranges they make the model that runs.
///
/// A scope is a place in the module tree; <see cref="In(string)"/> goes one level down.
/// </summary>
public sealed class ModuleScope
{
    // The Hugging Face Trainer exempts the type nn.LayerNorm, classes that register beside it, and
    // names with these words.
    private static readonly string[] s_exempt = ["bias", "layernorm", "rmsnorm"];

    private readonly ParameterTable.Builder _table;
    private readonly ITensorSource _source;
    private readonly string _path;
    private readonly ModelPart _part;
    private readonly bool _isUnused;

    /// <param name="table">Takes what the modules declare.</param>
    /// <param name="source">Gives them tensors; null only describes.</param>
    public ModuleScope(ParameterTable.Builder table, ITensorSource? source = null)
        : this(table, source ?? new NoTensors(), "", ModelPart.Decoder)
    {
    }

    private ModuleScope(
        ParameterTable.Builder table, ITensorSource source, string path, ModelPart part,
        bool isUnused = false) =>
        (_table, _source, _path, _part, _isUnused) = (table, source, path, part, isUnused);

    /// <summary>The module of this name inside this one.</summary>
    public ModuleScope In(string name) =>
        new(_table, _source, Name(name) + ".", _part, _isUnused);

    /// <summary>The module of this number inside this one.</summary>
    public ModuleScope In(int index) => In(index.ToString(Invariant));

    /// <summary>This place as the root of another part of the model.</summary>
    public ModuleScope As(ModelPart part) => new(_table, _source, _path, part, _isUnused);

    /// <summary>
    /// This place for a module that the model has and, as it is configured, does not run: its
    /// parameters are handed on and not trained, for no gradient reaches them.
    /// </summary>
    public ModuleScope Unused() =>
        new(_table, new NoTensors(), _path, _part, isUnused: true);

    /// <summary>
    /// The module at this place runs as one block: its frozen tensors are streamed until the
    /// block's end where the source of tensors says so, else null.
    /// </summary>
    public StreamedBlock? BeginBlock()
    {
        _table.AddBlock(_path);
        return _source.BeginBlock(_part);
    }

    /// <summary>A linear layer, on which an adapter can sit unless a reason is given.</summary>
    public Projection Linear(
        string name, int inputs, int outputs, bool bias = true, string? noAdapter = null)
    {
        string module = Name(name);
        _table.Add(new LinearModule(module, inputs, outputs, bias, noAdapter));
        string weight = Declare(module + ".weight", decays: true, [outputs, inputs]);
        string offset = bias ? Declare(module + ".bias", decays: true, [outputs]) : "";
        return _source.Projection(
            module, weight, 0, outputs, bias ? _source.Vector(offset, 0, outputs) : Tensor.None);
    }

    /// <summary>
    /// The next linear layers, of these names, have one input and lie together where they can be
    /// multiplied by as one.
    /// </summary>
    public void Together(int inputs, params ReadOnlySpan<(string Name, int Outputs)> layers)
    {
        int rows = 0, packed = 0;
        foreach (var (_, outputs) in layers) rows += outputs;
        foreach (var (name, _) in layers)
            packed += _source.IsPacked(Name(name) + ".weight") ? 1 : 0;
        if (packed == layers.Length || packed == 0)
            _source.Together(Name(layers[0].Name) + ".weight", rows, inputs);
    }

    /// <summary>
    /// Rows of one stored matrix (name_weight, name_bias) as layers of their own: the input
    /// projections of nn.MultiheadAttention, the module at this place, which PEFT 0.21 gives an
    /// adapter as a whole.
    /// </summary>
    public Projection[] Fused(string name, int inputs, params ReadOnlySpan<int> outputs)
    {
        int rows = 0;
        foreach (int count in outputs) rows += count;
        string module = _path.TrimEnd('.');
        string weight = Declare(Name(name) + "_weight", decays: true, [rows, inputs]);
        _table.Add(new LinearModule(module, inputs, rows, HasBias: true)
        {
            Weight = weight,
            OnlyRead = "PEFT 0.21 counts the change of its out_proj twice in forward and once in "
                + "the "
                + "gradient, PEFT 0.14 knows no such adapter: name kv_proj or out_proj, or train "
                + "the module whole with modules_to_save",
        });
        string bias = Declare(Name(name) + "_bias", decays: true, [rows]);
        var layers = new Projection[outputs.Length];
        int begin = 0;
        for (int i = 0; i < layers.Length; i++)
        {
            layers[i] = _source.Projection(
                module, weight, begin, outputs[i], _source.Vector(bias, begin, outputs[i]));
            begin += outputs[i];
        }

        return layers;
    }

    public Norm LayerNorm(string name, int size, float epsilon)
    {
        string weight = Declare(Name(name) + ".weight", decays: false, [size]);
        string bias = Declare(Name(name) + ".bias", decays: false, [size]);
        return new Norm(new LayerNorm(epsilon), _source.Vector(weight, 0, size),
            _source.Vector(bias, 0, size));
    }

    public Norm RmsNorm(string name, int size, NormKind kind)
    {
        string weight = Declare(Name(name) + ".weight", kind.Decays, [size]);
        return new Norm(
            new RmsNorm(kind.Epsilon, kind.Centred), _source.Vector(weight, 0, size), Tensor.None);
    }

    /// <summary>The same of rows that are gated behind it.</summary>
    public Norm GatedRmsNorm(string name, int size, NormKind kind)
    {
        string weight = Declare(Name(name) + ".weight", kind.Decays, [size]);
        return new Norm(
            new GatedRmsNorm(kind.Epsilon), _source.Vector(weight, 0, size), Tensor.None);
    }

    /// <summary>A vector that is added or multiplied, such as a bias.</summary>
    public Tensor Vector(string name, int size) =>
        _source.Vector(Declare(Name(name), decays: true, [size]), 0, size);

    /// <summary>Few numbers as kernels take them, rows of all axes but the first.</summary>
    public Tensor Rows(string name, params ReadOnlySpan<int> sizes)
    {
        Tensor rows = _source.Small(Declare(Name(name), decays: true, sizes));
        return rows.Exists ? rows.Reshape(sizes[0], (int)(rows.Shape.Count / sizes[0])) : rows;
    }

    /// <summary>A weight of a matrix product, all axes but the first seen as columns.</summary>
    public Tensor Matrix(string name, params ReadOnlySpan<int> sizes)
    {
        int cols = 1;
        foreach (int size in sizes[1..]) cols = checked(cols * size);
        return _source.Matrix(Declare(Name(name), decays: true, sizes), 0, sizes[0], cols);
    }

    /// <summary>
    /// A matrix that keeps its rows as they are, all axes but the last seen as rows: one whose rows
    /// are looked up or resampled, matrices of many experts.
    /// </summary>
    /// <param name="name">The parameter.</param>
    /// <param name="isFixed">See <see cref="ModelParameter"/>.</param>
    /// <param name="sizes">The official shape.</param>
    public Tensor Table(string name, bool isFixed = false, params ReadOnlySpan<int> sizes) =>
        Table(Declare(Name(name), decays: true, sizes, isFixed), isLookedUp: false);

    /// <summary>A matrix of which each run looks up few rows, and nothing else is done.</summary>
    public Tensor LookUp(string name, int rows, int cols)
    {
        string full = Declare(Name(name), decays: true, [rows, cols]);
        _table.AddLookedUp(full);
        return Table(full, isLookedUp: true);
    }

    private Tensor Table(string full, bool isLookedUp)
    {
        Tensor table = _source.Table(full, isLookedUp);
        return table.Exists
            ? table.Reshape((int)table.Shape.Rows, table.Shape.Cols) : table;
    }

    /// <summary>The embedding of tokens, whose matrix the head may use too.</summary>
    public TokenTable Tokens(string name, int rows, int cols, double scale, bool isHead)
    {
        string module = Name(name);
        _table.Add(new LinearModule(module, rows, cols, HasBias: false) { IsTable = true });
        Tensor table = isHead ? Table(name + ".weight", false, rows, cols)
            : LookUp(name + ".weight", rows, cols);
        return new TokenTable(table, scale,
            _source.Low(module), _source.Rows(module, module + ".weight"));
    }

    /// <summary>
    /// Matrices of many experts [outputs, inputs] as one parameter, which PEFT's target_parameters
    /// may name.
    /// </summary>
    public ExpertMatrices Experts(string name, int count, int outputs, int inputs)
    {
        string full = Name(name);
        _table.AddExperts(new LinearModule(full, inputs, outputs, HasBias: false)
        {
            Weight = full,
            Experts = count,
        });
        return new ExpertMatrices(Table(name, false, count, outputs, inputs), _source.Low(full));
    }

    /// <summary>A module without parameters, which a pattern of PEFT's may hit.</summary>
    public void Module(string name) => _table.AddModule(Name(name));

    /// <summary>
    /// A module that is another one's matrix used again; PEFT trains a copy where that one is in
    /// modules_to_save, and this one goes on with the original. Rows of single tokens are both's.
    /// </summary>
    public OutputHead TiedHead(string name, string to, TokenTable table, int inputs, int outputs)
    {
        _table.Tie(Name(name), Name(to));
        Tensor matrix = _source.Original(Name(to) + ".weight") is { Exists: true } original
            ? original : table.Table;
        return Head(name, matrix, table.Rows, inputs, outputs);
    }

    /// <summary>The output head, whose product is a part of the loss.</summary>
    public OutputHead Head(string name, int inputs, int outputs)
    {
        string module = Name(name);
        return Head(name, Matrix(name + ".weight", outputs, inputs),
            _source.Rows(module, module + ".weight"), inputs, outputs);
    }

    private OutputHead Head(string name, Tensor matrix, TokenRows? rows, int inputs, int outputs)
    {
        _table.Add(new LinearModule(Name(name), inputs, outputs, HasBias: false));
        _table.Head = Name(name);
        return new OutputHead(matrix, _source.Low(Name(name)), rows,
            rows is null ? Tensor.None : _source.Places(rows.Ids, outputs));
    }

    /// <summary>Parts that are not run: their tensors are handed on as they are.</summary>
    public void PassOver(params ReadOnlySpan<string> names)
    {
        foreach (string name in names) _table.PassOver(Name(name) + ".");
    }

    private static System.Globalization.CultureInfo Invariant =>
        System.Globalization.CultureInfo.InvariantCulture;

    private string Name(string name) => _path + name;

    private string Declare(string name, bool decays, ReadOnlySpan<int> sizes, bool isFixed = false)
    {
        foreach (string word in s_exempt)
            decays &= !name.Contains(word, StringComparison.OrdinalIgnoreCase);
        _table.Add(new ModelParameter(
            name, new Shape(sizes), _part, decays && !_isUnused, isFixed || _isUnused,
            _isUnused));
        return name;
    }

    private sealed class NoTensors : ITensorSource
    {
        public Tensor Vector(string name, int begin, int count) => Tensor.None;

        public Tensor Small(string name) => Tensor.None;

        public Tensor Matrix(string name, int begin, int rows, int cols) => Tensor.None;

        public Tensor Table(string name, bool isLookedUp) => Tensor.None;

        public Tensor Original(string name) => Tensor.None;

        public StreamedBlock? BeginBlock(ModelPart part) => null;

        public bool IsPacked(string weight) => false;

        public void Together(string first, int rows, int cols)
        {
        }

        public Projection Projection(
            string module, string weight, int begin, int rows, Tensor bias) =>
            new(new DenseWeight(Tensor.None), Tensor.None);
    }
}

/// <summary>Gives a model its tensors by official name while it is built.</summary>
public interface ITensorSource
{
    /// <summary>Elements begin..begin+count of a vector.</summary>
    Tensor Vector(string name, int begin, int count);

    /// <summary>All elements of a small tensor, kept as vectors are.</summary>
    Tensor Small(string name);

    /// <summary>
    /// Rows begin..begin+rows of a weight of matrix products, seen with these columns.
    /// </summary>
    Tensor Matrix(string name, int begin, int rows, int cols);

    /// <summary>A matrix that keeps its rows as they are.</summary>
    /// <param name="name">The parameter.</param>
    /// <param name="isLookedUp">See <see cref="ModuleScope.LookUp"/>.</param>
    Tensor Table(string name, bool isLookedUp);

    /// <summary>
    /// The frozen original of a matrix of which a copy is trained beside adapters; none where there
    /// is no such copy.
    /// </summary>
    Tensor Original(string name);

    /// <summary>What is asked for until the block's end is streamed; null where it is not.
    /// </summary>
    StreamedBlock? BeginBlock(ModelPart part);

    /// <summary>Whether a weight is frozen and dense.</summary>
    bool IsPacked(string weight);

    /// <summary>The next such weights, or trained ones, of so many rows in all, the first of this
    /// name, lie behind each other.</summary>
    void Together(string first, int rows, int cols);

    /// <summary>
    /// Rows of a weight as a linear layer, with the adapter of the module if it has one.
    /// </summary>
    Projection Projection(string module, string weight, int begin, int rows, Tensor bias);

    /// <summary>The adapter of an embedding or of the head; null where there is none.</summary>
    LowRankPart? Low(string module) => null;

    /// <summary>Its trained rows of single tokens; null where there are none.</summary>
    TokenRows? Rows(string module, string weight) => null;

    /// <summary>A matrix [rows, ids] with a one in each column, in the row of its number.</summary>
    Tensor Places(IReadOnlyList<int> ids, int rows) => Tensor.None;
}
